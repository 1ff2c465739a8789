// What this machine can do at most, for the "share of the limit" columns of the benchmarks.
//
//     limits MODE THREADS SECONDS [MIB]      prints one number
//
// MODE read: GB/s of plain loads over MIB megabytes a thread, each thread its own memory. Other modes:
// GOP/s, a multiply and an add being two operations, operands in registers, enough independent sums
// to hide every latency: fp32-W (fused multiply-add on W bits), int8-W (maddubs, madd, add: exact for
// any bytes), int4-W (maddubs of nibbles summed in 16 bits, widened once in eight), vnni-W
// (vpdpbusd), bf16-W (vdpbf16ps), amx-int8, amx-bf16.
// A mode that this CPU lacks exits with status 3. Compiled by limits.py.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

constexpr int kRounds = 4096;  // of a mode's body between two looks at the clock
constexpr int kSums = 12;      // independent chains of a round: registers 4 to 15

// The sequences are inline assembly, so that no compiler's choice of registers is measured. Inputs
// are registers 1 to 3, register 0 is for products.
#define FOR_SUMS(STEP) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11) \
  STEP(12) STEP(13) STEP(14) STEP(15)
#define CLOBBERS_256 "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
  "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

// Zeros everywhere: an integer product's time does not depend on its operands, and no float
// becomes a subnormal.
void clear_registers() { asm volatile("vzeroall" ::: CLOBBERS_256); }

#define FMA_256(n) "vfmadd231ps %%ymm1, %%ymm2, %%ymm" #n "\n"
#define FMA_512(n) "vfmadd231ps %%zmm1, %%zmm2, %%zmm" #n "\n"
#define BF16_512(n) "vdpbf16ps %%zmm1, %%zmm2, %%zmm" #n "\n"
#define VNNI_512(n) "vpdpbusd %%zmm1, %%zmm2, %%zmm" #n "\n"
#define VNNI_256(n) "%{vex%} vpdpbusd %%ymm1, %%ymm2, %%ymm" #n "\n"
#define INT8_256(n) \
  "vpmaddubsw %%ymm1, %%ymm2, %%ymm0\n vpmaddwd %%ymm3, %%ymm0, %%ymm0\n" \
  "vpaddd %%ymm0, %%ymm" #n ", %%ymm" #n "\n"
#define NIBBLES_256(n) \
  "vpmaddubsw %%ymm1, %%ymm2, %%ymm0\n vpaddw %%ymm0, %%ymm" #n ", %%ymm" #n "\n"
#define WIDEN_256(n) \
  "vpmaddwd %%ymm3, %%ymm" #n ", %%ymm0\n vpaddd %%ymm0, %%ymm3, %%ymm0\n" \
  "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n"

#define BODY(name, sequence)                                     \
  void name() {                                                  \
    clear_registers();                                           \
    for (int round = 0; round < kRounds; ++round) {              \
      asm volatile(FOR_SUMS(sequence) ::: CLOBBERS_256);         \
    }                                                            \
  }

BODY(fp32_256, FMA_256)
BODY(int8_256, INT8_256)
BODY(fp32_512, FMA_512)
BODY(bf16_512, BF16_512)
BODY(vnni_512, VNNI_512)
BODY(vnni_256, VNNI_256)

void int4_256() {
  clear_registers();
  for (int round = 0; round < kRounds; ++round) {
    asm volatile(FOR_SUMS(NIBBLES_256) FOR_SUMS(NIBBLES_256) FOR_SUMS(NIBBLES_256)
                 FOR_SUMS(NIBBLES_256) FOR_SUMS(NIBBLES_256) FOR_SUMS(NIBBLES_256)
                 FOR_SUMS(NIBBLES_256) FOR_SUMS(NIBBLES_256) FOR_SUMS(WIDEN_256)
                 ::: CLOBBERS_256);
  }
}

// The 64-byte tile configuration.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_nbytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool allow_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

void begin_tiles() {
  const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  asm volatile(
      "tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n"
      "tilezero %%tmm4\n tilezero %%tmm5\n tilezero %%tmm6\n tilezero %%tmm7\n" ::);
}

#define TILES(instruction)                                                        \
  instruction " %%tmm6, %%tmm4, %%tmm0\n" instruction " %%tmm7, %%tmm4, %%tmm1\n" \
  instruction " %%tmm6, %%tmm5, %%tmm2\n" instruction " %%tmm7, %%tmm5, %%tmm3\n"

void amx_int8() {
  for (int i = 0; i < kRounds * kSums / 4; ++i) asm volatile(TILES("tdpbssd") ::);
}

void amx_bf16() {
  for (int i = 0; i < kRounds * kSums / 4; ++i) asm volatile(TILES("tdpbf16ps") ::);
}

struct Mode {
  const char* name;
  bool is_supported;
  void (*body)();
  double ops_per_sequence;  // of one of the body's kRounds * kSums
};

// CPUID leaf 7, EDX: AMX-BF16 is bit 22, AMX-TILE 24, AMX-INT8 25. GCC 12 has no name for them all.
bool has_amx(unsigned bit) {
  unsigned eax = 7, ebx, ecx = 0, edx;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (edx >> 24 & 1) != 0 && (edx >> bit & 1) != 0 && allow_tiles();
}

std::vector<Mode> modes() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avxvnni = __builtin_cpu_supports("avxvnni") != 0;
  const bool avx512 = __builtin_cpu_supports("avx512bw") != 0;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  return {
      {"fp32-256", avx2, fp32_256, 8 * 2},
      {"int8-256", avx2, int8_256, 32 * 2},
      {"int4-256", avx2, int4_256, 8 * 32 * 2},
      {"vnni-256", avxvnni, vnni_256, 32 * 2},
      {"fp32-512", avx512, fp32_512, 16 * 2},
      {"bf16-512", bf16, bf16_512, 32 * 2},
      {"vnni-512", vnni, vnni_512, 64 * 2},
      {"amx-int8", has_amx(25), amx_int8, 16.0 * 16 * 64 * 2},
      {"amx-bf16", has_amx(22), amx_bf16, 16.0 * 16 * 32 * 2},
  };
}

// Runs body() on every thread for `seconds`; returns how many calls all of them made per second.
template <class Body>
double calls_per_s(int num_threads, double seconds, const Body& body) {
  std::atomic<int> num_ready{0};
  std::atomic<double> rate{0.0};
  const auto work = [&](int index) {
    body(index);  // warms up: clocks, pages
    ++num_ready;
    while (num_ready < num_threads) {
    }
    int64_t calls = 0;
    const auto start = Clock::now();
    double elapsed = 0.0;
    do {
      body(index);
      ++calls;
      elapsed = seconds_since(start);
    } while (elapsed < seconds);
    const double mine = static_cast<double>(calls) / elapsed;
    for (double sum = rate; !rate.compare_exchange_weak(sum, sum + mine);) {
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back(work, i);
  for (auto& thread : threads) thread.join();
  return rate;
}

void read_all(const char* bytes, size_t nbytes) {
  for (const char* end = bytes + nbytes; bytes < end; bytes += 256) {
    asm volatile(
        "vmovdqa (%0), %%ymm0\n vmovdqa 32(%0), %%ymm1\n vmovdqa 64(%0), %%ymm2\n"
        "vmovdqa 96(%0), %%ymm3\n vmovdqa 128(%0), %%ymm4\n vmovdqa 160(%0), %%ymm5\n"
        "vmovdqa 192(%0), %%ymm6\n vmovdqa 224(%0), %%ymm7\n" ::"r"(bytes)
        : "memory", CLOBBERS_256);
  }
}

double read_gb_per_s(int num_threads, double seconds, size_t mib) {
  const size_t nbytes = mib << 20;
  std::vector<char*> buffers;
  for (int i = 0; i < num_threads; ++i) {
    void* place = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) std::abort();
    madvise(place, nbytes, MADV_HUGEPAGE);
    std::memset(place, 1 + i, nbytes);
    buffers.push_back(static_cast<char*>(place));
  }
  // In slices, so that threads stop at about the same time.
  constexpr size_t kSlices = 16;
  std::vector<size_t> next(static_cast<size_t>(num_threads) * 8);  // 8: a cache line each
  const double rate = calls_per_s(num_threads, seconds, [&](int index) {
    size_t& slice = next[static_cast<size_t>(index) * 8];
    read_all(buffers[static_cast<size_t>(index)] + slice * (nbytes / kSlices), nbytes / kSlices);
    slice = (slice + 1) % kSlices;
  });
  return rate * static_cast<double>(nbytes / kSlices) / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const std::string name = argv[1];
  const int num_threads = std::atoi(argv[2]);
  const double seconds = std::atof(argv[3]);
  if (name == "read") {
    const size_t mib = argc > 4 ? std::strtoul(argv[4], nullptr, 10) : 256;
    std::printf("%.3f\n", read_gb_per_s(num_threads, seconds, mib));
    return 0;
  }
  for (const Mode& mode : modes()) {
    if (name != mode.name) continue;
    if (!mode.is_supported) return 3;
    const bool is_amx = name.compare(0, 3, "amx") == 0;
    const double rate = calls_per_s(num_threads, seconds, [&](int) {
      thread_local bool is_begun = false;
      if (is_amx && !is_begun) begin_tiles(), is_begun = true;
      mode.body();
    });
    std::printf("%.3f\n", rate * kRounds * kSums * mode.ops_per_sequence / 1e9);
    return 0;
  }
  return 2;
}
