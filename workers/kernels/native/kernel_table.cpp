#include "kernel_table.h"

#include <cstring>
#include <string>

#include "failure.h"

namespace furiosa {

namespace {

const KernelTable* const kTables[] = {
#if defined(__x86_64__)
    &kAmxKernels, &kAvx512Kernels, &kAvxVnniKernels, &kAvx2Kernels,
#elif defined(__aarch64__)
    &kNeonKernels,
#endif
    &kPortableKernels,
};

}  // namespace

const KernelTable* kernel_table(int index) noexcept {
  for (const KernelTable* table : kTables) {
    if (table->is_supported() && index-- == 0) return table;
  }
  return nullptr;
}

const KernelTable& kernel_table_named(const char* isa) {
  for (int i = 0; const KernelTable* table = kernel_table(i); ++i) {
    if (std::strcmp(table->isa, isa) == 0) return *table;
  }
  throw Failure{kInvalidConfig, std::string("this CPU has no kernel family ") + isa};
}

}  // namespace furiosa
