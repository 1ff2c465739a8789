// One thread per PE, running numbered items of one job at a time.
//
// A job is `count` calls body(item, pe). Every PE has a range of neighbouring items and takes them
// in order, so that it goes through memory in order too; a PE that has none left takes the last
// item of another's range, so that one that is held up (its core is shared, say) costs its share of
// the work, not the step. The calling thread is PE 0 and waits for finished items, not for threads:
// a PE that is late finds the job gone. A PE without a job spins briefly, then sleeps; an idle pool
// costs no CPU.
//
// A range is one 64-bit word, generation | end | next, and an item is taken by compare-and-swap on
// it: that is what makes late PEs safe, since a word of another generation refuses them. An odd
// generation is closed.
#pragma once

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace furiosa {

class ThreadPool {
 public:
  // cpus[i]: the CPUs that PE i is bound to; empty leaves it to the system. Throws
  // std::system_error when threads cannot be started.
  explicit ThreadPool(std::vector<std::vector<int>> cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(cpus_.size()); }

  struct NoFinish {
    void operator()() const {}
  };

  // Runs body(item, pe) for every item in 0 .. count, then finish() on the PE that ended last, and
  // returns when all is done. Neither may throw. Not reentrant.
  template <class Body, class Finish = NoFinish>
  void run(int count, const Body& body, const Finish& finish = Finish()) {
    if (count <= 1 || size() == 1 || count > kMaxItems) {
      for (int item = 0; item < count; ++item) body(item, 0);
      finish();
      return;
    }
    struct Job {
      const Body& body;
      const Finish& finish;
    };
    const Job job{body, finish};
    run_job(count, &job, [](const void* context, int item, int pe) {
      const Job& called = *static_cast<const Job*>(context);
      item == kFinish ? called.finish() : called.body(item, pe);
    });
  }

  // Binds the calling thread to PE 0's CPUs while it lives, then gives it back its own.
  class CallerBinding {
   public:
    explicit CallerBinding(const ThreadPool& pool);
    ~CallerBinding();

   private:
    cpu_set_t previous_;
    bool is_bound_ = false;
  };

 private:
  static constexpr int kFinish = -1;  // the item that stands for finish()
  static constexpr int kMaxItems = (1 << 20) - 1;  // more than a step has; past it one PE does all

  struct alignas(64) Range {
    std::atomic<uint64_t> word{0};
  };

  using Trampoline = void (*)(const void* context, int item, int pe);

  void run_job(int count, const void* context, Trampoline trampoline);
  bool take(Range& range, uint32_t generation, bool is_own, int* item);
  void post(uint32_t generation, int count);
  void run_items(uint32_t generation, int pe);
  void serve(int pe);
  void stop();

  std::vector<std::vector<int>> cpus_;
  std::vector<std::thread> threads_;

  std::vector<Range> ranges_;  // one per PE
  alignas(64) std::atomic<uint32_t> generation_{1};
  std::atomic<const void*> context_{nullptr};
  std::atomic<Trampoline> trampoline_{nullptr};
  alignas(64) std::atomic<int> num_unfinished_{0};
  std::atomic<bool> is_caller_asleep_{false};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> is_stopping_{false};
  std::mutex mutex_;
  std::condition_variable job_posted_, job_done_;
};

}  // namespace furiosa
