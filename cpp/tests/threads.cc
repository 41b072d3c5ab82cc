// The pool of threads: called from several threads at once, with more and fewer of them, and after a fork.

#include <atomic>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "plain.h"

namespace plain {
namespace {

// A product that is large enough to be shared, and its answer.
struct Job {
  Random random;
  int64_t rows = 64, columns = 96, count = 70;
  std::vector<float> dense;
  Panelled w;
  Floats x, expected, y;

  explicit Job(uint64_t seed)
      : random(seed),
        dense(weights(random, rows, columns)),
        w(dense, rows, columns, 4, 1, 32, 4),
        x(Floats::numbers(random, columns * count)),
        expected(random, rows * count),
        y(random, rows * count) {
    run(expected, 1);
  }

  bool run(Floats& out, int32_t threads) {
    const secateur_plan plan = {threads, 16};
    for (int64_t i = 0; i < out.size(); ++i) out[i] = NAN;
    return secateur_spmm(&w.header, x.data(), columns, 1, out.data(), rows, 1, count, nullptr, &plan) == SECATEUR_OK;
  }

  bool repeat(int32_t threads) { return run(y, threads) && same_bits(y, expected); }
};

}  // namespace

void concurrent_callers(int calls) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (uint64_t number = 0; number < 4; ++number)
    callers.emplace_back([&, number] {
      Job job(number);
      for (int i = 0; i < calls; ++i) wrong += !job.repeat(static_cast<int32_t>(job.random.between(1, 6)));
    });
  for (std::thread& caller : callers) caller.join();
  expect(wrong == 0, "callers on several threads at once get other answers");
}

void fork_case() {
#if (defined(__unix__) || defined(__APPLE__)) && !defined(__SANITIZE_THREAD__)
  Job job(1);
  expect(job.repeat(3), "before a fork");
#if !defined( \
    __SANITIZE_ADDRESS__)  // whose allocator stays locked in a child that is forked while others ask for memory
  // Others are at work while the process is copied: what they hold must not be waited for in the child.
  std::atomic<bool> begun{false}, done{false};
  std::thread busy([&] {
    Job other(2);
    while (!done) {
      expect(other.repeat(2), "while the process forks");
      begun = true;
    }
  });
  while (!begun) std::this_thread::yield();
#endif
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) alarm(60), _exit(job.repeat(3) && job.repeat(2) ? 0 : 1);
    int status = 0;
    expect(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "in a forked child");
    expect(job.repeat(3), "in the parent of a forked child");
  }
#if !defined(__SANITIZE_ADDRESS__)
  done = true;
  busy.join();
#endif
#endif
}

}  // namespace plain
