// Working memory of one thread, kept from call to call.
#pragma once

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "simd.h"

namespace secateur {
namespace {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // At least `count` floats at a multiple of 64 bytes; what was in it before is gone.
  float* at_least(int64_t count) {
#if defined(__SANITIZE_ADDRESS__)
    size_ = -1;  // always new, and closed behind the last float: what is left over would hide a read too far
#endif
    if (count > size_) {
      std::free(data_);
      size_ = 0;
      const int64_t bytes = (count * 4 + 4095) / 4096 * 4096;
      data_ = static_cast<float*>(std::aligned_alloc(4096, static_cast<size_t>(bytes)));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes / 4;
#if defined(__SANITIZE_ADDRESS__)
      ASAN_POISON_MEMORY_REGION(data_ + count, static_cast<size_t>(bytes - count * 4));
#endif
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

enum Purpose { kPanel, kTile, kSums, kPlaces, kTaps, kMasks, kBlocks, kWindow, kPhases, kVector, kMarks, kPurposes };

inline Scratch& scratch(Purpose purpose) {
  static thread_local Scratch buffers[kPurposes];
  return buffers[purpose];
}

}  // namespace
}  // namespace secateur
