#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace secateur {
namespace {

// How often a thread looks for work before it goes to sleep: some tens of microseconds, the gap between two layers.
constexpr int kSpins = 4000;
constexpr uint64_t kTurn = kMostThreads + 1;

inline void breathe() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Tasks that one thread begins with, and others go on with once they are through with theirs. A thread comes back to the
// part of the tasks that it had in the last call, unless another was there before it, so that what a layer left in the
// caches of one core the next layer finds there.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
  std::atomic<bool> taken{false};
};

// What the threads of one call share.
struct Work {
  Work(int64_t count, int32_t threads, void (*function)(void*, int64_t), void* data)
      : ranges(threads < kMostRanges ? threads : kMostRanges), task(function), context(data) {
    for (int32_t i = 0; i < ranges; ++i) {
      range[i].next.store(count * i / ranges, std::memory_order_relaxed);
      range[i].end = count * (i + 1) / ranges;
    }
  }

  static constexpr int32_t kMostRanges = 64;  // more threads share them
  int32_t ranges;
  void (*task)(void*, int64_t);
  void* context;
  Range range[kMostRanges];
};

std::atomic<int32_t> threads_seen{0};

void take(void* data) {
  static thread_local int32_t mine = threads_seen.fetch_add(1, std::memory_order_relaxed) & 0xffff;
  Work& work = *static_cast<Work*>(data);
  int32_t begin = mine % work.ranges;
  for (int32_t i = 0; i < work.ranges; ++i) {
    const int32_t other = (mine + i) % work.ranges;
    if (work.range[other].taken.exchange(true, std::memory_order_relaxed)) continue;
    begin = other;
    break;
  }
  if (begin != mine % work.ranges) mine = begin;
  for (int32_t i = 0; i < work.ranges; ++i) {
    Range& range = work.range[(begin + i) % work.ranges];
    for (int64_t n = range.next.fetch_add(1, std::memory_order_relaxed); n < range.end;
         n = range.next.fetch_add(1, std::memory_order_relaxed))
      work.task(work.context, n);
  }
}

class Pool {
 public:
  void run(Work& work, int32_t threads) {
    std::unique_lock<std::mutex> at_work(busy_, std::try_to_lock);
    if (threads > kMostThreads) threads = kMostThreads;
    if (!at_work.owns_lock() || !grow(threads - 1)) return take(&work);
    work_ = &work;
    working_.store(threads - 1, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(sleep_);
      const uint64_t number = turn_.load(std::memory_order_relaxed) / kTurn + 1;
      turn_.store(number * kTurn + static_cast<uint64_t>(threads - 1), std::memory_order_release);
    }
    wake_.notify_all();
    take(&work);
    // Helpers may not have begun where there are more threads than processors: they are let through.
    for (int spins = 0; working_.load(std::memory_order_acquire) != 0;)
      if (++spins < kSpins)
        breathe();
      else
        std::this_thread::yield();
  }

 private:
  bool grow(int32_t wanted) {
    try {
      for (; workers_ < wanted; ++workers_) {
        const uint64_t seen = turn_.load(std::memory_order_relaxed);
        std::thread([this, number = static_cast<uint64_t>(workers_), seen] { work(number, seen); }).detach();
      }
    } catch (...) {
      return false;  // no more threads to be had: the caller works alone
    }
    return true;
  }

  void work(uint64_t number, uint64_t seen) {
    for (;;) {
      int spins = 0;
      while (turn_.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpins) {
          breathe();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return turn_.load(std::memory_order_relaxed) != seen; });
      }
      seen = turn_.load(std::memory_order_acquire);
      if (number < seen % kTurn) {
        take(work_);
        working_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  int32_t workers_ = 0;
  // The number of the turn, times kTurn, plus how many helpers it has: read as one, so that a thread that comes
  // late never takes one turn's number for another's.
  std::atomic<uint64_t> turn_{0};
  std::atomic<int32_t> working_{0};
  Work* work_ = nullptr;
};

// Another runtime's way to run a function on several threads, or null.
std::atomic<Parallel> borrowed{nullptr};

Pool* made();

// Never destroyed: its threads may outlive main, and a forked child starts with a new one. Made when the library is
// loaded: a fork in the middle of a first use would leave the child with a lock that nobody opens.
Pool* pool = made();

Pool* made() {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] {
    pool = new Pool;
    borrowed.store(nullptr);  // that runtime's threads are not in the child either, and it may not know
  });
#endif
  return new Pool;
}

}  // namespace

void parallel_for(int64_t count, int32_t threads, void (*task)(void*, int64_t), void* context) {
  if (threads > count) threads = static_cast<int32_t>(count);
  if (threads < 2) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  Work work(count, threads, task, context);
  const Parallel parallel = borrowed.load(std::memory_order_acquire);
  if (parallel == nullptr) return pool->run(work, threads);
  parallel(take, &work, static_cast<unsigned>(threads), 0);
}

void use_parallel(Parallel parallel) { borrowed.store(parallel, std::memory_order_release); }

}  // namespace secateur
