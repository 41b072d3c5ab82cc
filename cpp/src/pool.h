// Threads that wait for work. A task's result never depends on which thread does it, or on how many there are.
#pragma once

#include <cstdint>

namespace secateur {

constexpr int32_t kMostThreads = 1023;

// Calls task(context, i) for every i in [0, count), on at most `threads` threads, this one included, and returns when
// all are done. When the pool is at work for another caller, this thread does everything itself.
void parallel_for(int64_t count, int32_t threads, void (*task)(void* context, int64_t i), void* context);

// As GOMP_parallel of libgomp: calls work(data) on so many threads at once, and returns when all have.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// From now on the threads of another runtime do the work: its idle threads may spin for milliseconds, and would keep
// this library's from running. Null goes back to its own.
void use_parallel(Parallel parallel);

template <class Function>
void parallel_for(int64_t count, int32_t threads, Function function) {
  parallel_for(
      count, threads, [](void* context, int64_t i) { (*static_cast<Function*>(context))(i); }, &function);
}

}  // namespace secateur
