// The pool of threads alone, for the thread sanitizer: pool [CALLS]. Several threads call it at once, each with more
// and fewer helpers from call to call; every task must be done once, and be seen by its caller without a lock.

#include "../src/pool.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 2000;
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (unsigned number = 0; number < 4; ++number)
    callers.emplace_back([&, number] {
      std::mt19937 random(number);
      std::vector<int64_t> done;
      for (int call = 0; call < calls; ++call) {
        // At the end more threads than there are ranges to begin with; all of them wake at every call from then on.
        const bool many = call >= calls - calls / 50;
        const int64_t count = random() % (many ? 300 : 40);
        const int32_t threads = static_cast<int32_t>(random() % (many ? 100 : 8));
        done.assign(static_cast<size_t>(count), 0);
        secateur::parallel_for(count, threads, [&](int64_t i) { done[static_cast<size_t>(i)] += i + call; });
        for (int64_t i = 0; i < count; ++i) wrong += done[static_cast<size_t>(i)] != i + call;
      }
    });
  for (std::thread& caller : callers) caller.join();
  if (wrong != 0) return std::fprintf(stderr, "FAILED: %d tasks were not done exactly once\n", wrong.load()), 1;
  std::printf("%d calls from each of 4 threads: every task done once\n", calls);
  return 0;
}
