#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
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
constexpr uint32_t kClosed = 0xffffffffu;  // a "next item" past the end of any job

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

uint64_t ticket_of(uint32_t generation, uint32_t next) { return uint64_t{generation} << 32 | next; }
uint32_t generation_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

// Binding is an optimisation: where a container forbids it, threads run wherever they may.
void bind_this_thread(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) {
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  }
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

std::vector<int> cpus_of_this_thread() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (pthread_getaffinity_np(pthread_self(), sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

}  // namespace

ThreadPool::ThreadPool(std::vector<std::vector<int>> cpus)
    : cpus_(std::move(cpus)), ticket_(ticket_of(1, kClosed)) {
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

bool ThreadPool::take(uint32_t generation, int count, int* item) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (generation_of(ticket) == generation) {
    const uint32_t next = static_cast<uint32_t>(ticket);
    if (next >= static_cast<uint32_t>(count)) return false;
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
      *item = static_cast<int>(next);
      return true;
    }
  }
  return false;
}

void ThreadPool::run_items(uint32_t generation, int pe) {
  // These may already be the next job's; then `take` fails, because that job closed this one first.
  const void* context = context_.load(std::memory_order_acquire);
  const Trampoline trampoline = trampoline_.load(std::memory_order_acquire);
  const int count = count_.load(std::memory_order_acquire);
  int item;
  while (take(generation, count, &item)) {
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

void ThreadPool::run_job(int count, const void* context, Trampoline trampoline) {
  const uint32_t generation = generation_of(ticket_.load(std::memory_order_relaxed)) + 1;
  context_.store(context, std::memory_order_release);
  trampoline_.store(trampoline, std::memory_order_release);
  count_.store(count, std::memory_order_release);
  num_unfinished_.store(count + 1, std::memory_order_release);
  ticket_.store(ticket_of(generation, 0));
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
  ticket_.store(ticket_of(generation + 1, kClosed));
}

void ThreadPool::serve(int pe) {
  bind_this_thread(cpus_[static_cast<size_t>(pe)]);
  uint32_t served = 0;
  const auto is_called = [this, &served] {
    const uint32_t generation = generation_of(ticket_.load());
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
    const uint32_t generation = generation_of(ticket_.load());
    if (generation % 2 != 0) continue;
    run_items(generation, pe);
    served = generation;
  }
}

ThreadPool::CallerBinding::CallerBinding(const ThreadPool& pool) {
  const std::vector<int>& cpus = pool.cpus_[0];
  if (cpus.empty()) return;
  previous_ = cpus_of_this_thread();
  is_bound_ = !previous_.empty() && previous_ != cpus;
  if (is_bound_) bind_this_thread(cpus);
}

ThreadPool::CallerBinding::~CallerBinding() {
  if (is_bound_) bind_this_thread(previous_);
}

}  // namespace furiosa
