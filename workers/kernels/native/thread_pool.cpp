#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace furiosa {

namespace {

// About 100 microseconds: longer than the gap between two jobs of a step, shorter than anyone
// would notice as load. Waking a sleeping thread costs about as much.
constexpr int kMaxSpins = 4000;

// A range's word: 24 bits of the generation, 20 of the end, 20 of the next item.
constexpr int kItemBits = 20;
constexpr uint32_t kItemMask = (1u << kItemBits) - 1;
uint64_t word_of(uint32_t generation, uint32_t next, uint32_t end) {
  return uint64_t{generation} << (2 * kItemBits) | uint64_t{end} << kItemBits | next;
}
uint32_t generation_in(uint64_t word) { return static_cast<uint32_t>(word >> (2 * kItemBits)); }
// Generations are counted in 24 bits; parity survives their wrapping.
uint32_t following(uint32_t generation) { return (generation + 1) & 0xffffffu; }

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

cpu_set_t set_of(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) {
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  }
  return set;
}

// Binding is an optimisation: where a container forbids it, threads run wherever they may.
void bind_this_thread(const cpu_set_t& set) {
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

}  // namespace

ThreadPool::ThreadPool(std::vector<std::vector<int>> cpus)
    : cpus_(std::move(cpus)), ranges_(cpus_.size()) {
  post(1, 0);
  // Signals belong to the caller's own threads (Python's main thread, in particular).
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int pe = 1; pe < size(); ++pe) threads_.emplace_back([this, pe] { serve(pe); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  is_stopping_.store(true);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_posted_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

// An item of the range: the next for its own PE, the last for others.
bool ThreadPool::take(Range& range, uint32_t generation, bool is_own, int* item) {
  uint64_t word = range.word.load(std::memory_order_acquire);
  while (generation_in(word) == generation) {
    const uint32_t next = word & kItemMask, end = word >> kItemBits & kItemMask;
    if (next >= end) return false;
    const uint64_t left =
        is_own ? word_of(generation, next + 1, end) : word_of(generation, next, end - 1);
    if (range.word.compare_exchange_weak(word, left, std::memory_order_acq_rel)) {
      *item = static_cast<int>(is_own ? next : end - 1);
      return true;
    }
  }
  return false;
}

void ThreadPool::run_items(uint32_t generation, int pe) {
  // These may already be the next job's; then `take` fails, because that job closed this one first.
  const void* context = context_.load(std::memory_order_acquire);
  const Trampoline trampoline = trampoline_.load(std::memory_order_acquire);
  for (int i = 0; i < size();) {
    int item;
    Range& range = ranges_[static_cast<size_t>((pe + i) % size())];
    if (!take(range, generation, i == 0, &item)) {
      ++i;
      continue;
    }
    trampoline(context, item, pe);
    // One more than the items: the last of them is followed by finish().
    if (num_unfinished_.fetch_sub(1) != 2) continue;
    trampoline(context, kFinish, pe);
    num_unfinished_.store(0);
    if (is_caller_asleep_.load()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_done_.notify_one();
    }
  }
}

// Opens or closes all ranges, then tells the PEs.
void ThreadPool::post(uint32_t generation, int count) {
  for (int pe = 0; pe < size(); ++pe) {
    const auto bound = [&](int64_t index) { return static_cast<uint32_t>(index * count / size()); };
    ranges_[static_cast<size_t>(pe)].word.store(word_of(generation, bound(pe), bound(pe + 1)),
                                                std::memory_order_release);
  }
  generation_.store(generation);
}

void ThreadPool::run_job(int count, const void* context, Trampoline trampoline) {
  const uint32_t generation = following(generation_.load(std::memory_order_relaxed));
  context_.store(context, std::memory_order_release);
  trampoline_.store(trampoline, std::memory_order_release);
  num_unfinished_.store(count + 1, std::memory_order_release);
  post(generation, count);
  if (num_asleep_.load() > 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_posted_.notify_all();
  }

  run_items(generation, 0);
  for (int spins = 0; num_unfinished_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kMaxSpins) {
      relax();
      continue;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    is_caller_asleep_.store(true);
    job_done_.wait(lock, [this] { return num_unfinished_.load() == 0; });
    is_caller_asleep_.store(false);
  }
  post(following(generation), 0);
}

void ThreadPool::serve(int pe) {
  const std::vector<int>& cpus = cpus_[static_cast<size_t>(pe)];
  if (!cpus.empty()) bind_this_thread(set_of(cpus));
  uint32_t served = 0;
  const auto is_called = [this, &served] {
    const uint32_t generation = generation_.load();
    return is_stopping_.load() || (generation % 2 == 0 && generation != served);
  };
  for (;;) {
    for (int spins = 0; spins < kMaxSpins && !is_called(); ++spins) relax();
    if (!is_called()) {
      std::unique_lock<std::mutex> lock(mutex_);
      num_asleep_.fetch_add(1);
      job_posted_.wait(lock, is_called);
      num_asleep_.fetch_sub(1);
    }
    if (is_stopping_.load()) return;
    const uint32_t generation = generation_.load();
    if (generation % 2 != 0) continue;
    run_items(generation, pe);
    served = generation;
  }
}

ThreadPool::CallerBinding::CallerBinding(const ThreadPool& pool) {
  const std::vector<int>& cpus = pool.cpus_[0];
  if (cpus.empty()) return;
  if (pthread_getaffinity_np(pthread_self(), sizeof previous_, &previous_) != 0) return;
  const cpu_set_t wanted = set_of(cpus);
  is_bound_ = !CPU_EQUAL(&previous_, &wanted);
  if (is_bound_) bind_this_thread(wanted);
}

ThreadPool::CallerBinding::~CallerBinding() {
  if (is_bound_) bind_this_thread(previous_);
}

}  // namespace furiosa
