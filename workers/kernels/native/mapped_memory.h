// Anonymous memory that costs nothing until it is touched: the KV cache and the step's buffers.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace furiosa {

class MappedMemory {
 public:
  // Zero pages, in huge ones where the system gives them: attention and activations go through far
  // more memory than small pages' translations cover. `nbytes` may be far more than will ever be
  // touched. Throws std::bad_alloc when the address space has no room.
  explicit MappedMemory(int64_t nbytes) {
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t wanted = static_cast<size_t>(nbytes > 0 ? nbytes : 1);
    nbytes_ = wanted < kHugePage ? wanted : wanted + kHugePage;
    base_ = mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(base_);
    if (wanted < kHugePage) return;
    data_ += (kHugePage - reinterpret_cast<uintptr_t>(base_) % kHugePage) % kHugePage;
    madvise(data_, wanted, MADV_HUGEPAGE);  // advice: where it is refused, small pages do
  }
  ~MappedMemory() { munmap(base_, nbytes_); }
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  uint8_t* data() const { return data_; }

 private:
  void* base_;
  size_t nbytes_;
  uint8_t* data_;
};

// Hands out 64-byte aligned parts of one mapping. Used twice: first without memory, to add up the
// sizes, then with it.
class Arena {
 public:
  explicit Arena(uint8_t* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + nbytes_);
    nbytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
  int64_t nbytes() const { return nbytes_; }

 private:
  uint8_t* base_;
  int64_t nbytes_ = 0;
};

}  // namespace furiosa
