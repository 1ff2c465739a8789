// One thread per PE, running numbered items of one job at a time.
//
// A job is `count` calls body(item, pe). Every PE takes the next item from a shared counter, so a
// PE that is held up (its core is shared, say) costs its share of the work, not the step. The
// calling thread is PE 0 and waits for finished items, not for threads: a PE that is late finds
// the job gone. A PE without a job spins briefly, then sleeps; an idle pool costs no CPU.
//
// The ticket, generation << 32 | next item, is what makes late PEs safe: an item is taken by
// compare-and-swap on the generation whose fields the PE has read. An odd generation is closed.
#pragma once

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
    if (count <= 1 || size() == 1) {
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
    std::vector<int> previous_;
    bool is_bound_ = false;
  };

 private:
  static constexpr int kFinish = -1;  // the item that stands for finish()

  using Trampoline = void (*)(const void* context, int item, int pe);

  void run_job(int count, const void* context, Trampoline trampoline);
  bool take(uint32_t generation, int count, int* item);
  void run_items(uint32_t generation, int pe);
  void serve(int pe);
  void stop();

  std::vector<std::vector<int>> cpus_;
  std::vector<std::thread> threads_;

  alignas(64) std::atomic<uint64_t> ticket_;
  std::atomic<const void*> context_{nullptr};
  std::atomic<Trampoline> trampoline_{nullptr};
  std::atomic<int> count_{0};
  alignas(64) std::atomic<int> num_unfinished_{0};
  std::atomic<bool> is_caller_asleep_{false};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> is_stopping_{false};
  std::mutex mutex_;
  std::condition_variable job_posted_, job_done_;
};

}  // namespace furiosa
