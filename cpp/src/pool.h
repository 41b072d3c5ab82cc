// Threads that wait for work. A task's result never depends on which thread does it, or on how many there are.
#pragma once

#include <cstdint>

namespace secateur {

constexpr int32_t kMostThreads = 1023;

// Calls task(context, i) for every i in [0, count), on at most `threads` threads, this one included, and returns when
// all are done. When the pool is at work for another caller, this thread does everything itself.
void parallel_for(int64_t count, int32_t threads, void (*task)(void* context, int64_t i), void* context);

template <class Function>
void parallel_for(int64_t count, int32_t threads, Function function) {
  parallel_for(
      count, threads, [](void* context, int64_t i) { (*static_cast<Function*>(context))(i); }, &function);
}

}  // namespace secateur
