// What every instruction set offers; the library has one table for each that it was built for.
#pragma once

#include <cstdint>

#include "secateur_sparse.h"

namespace secateur {

struct Kernels {
  const char* name;
  bool (*usable)();
  int32_t (*spmm)(const secateur_panelled& w, const float* x, int64_t x_step, int64_t x_stride, float* y,
                  int64_t y_step, int64_t y_stride, int64_t count, const secateur_epilogue& epilogue,
                  const secateur_plan& plan);
  int32_t (*gemv)(const secateur_panelled& w, const float* x, float* y, const secateur_epilogue& epilogue,
                  const secateur_plan& plan);
  int32_t (*gemv_bitmask)(const secateur_bitmask& w, const float* x, float* y, const secateur_epilogue& epilogue,
                          const secateur_plan& plan);
  int32_t (*conv2d)(const secateur_panelled& w, const secateur_convolution& shape, const float* x, float* y,
                    const secateur_epilogue& epilogue, const secateur_plan& plan);
  int32_t (*depthwise2d)(const float* weights, int64_t multiplier, const secateur_convolution& shape, const float* x,
                         float* y, const secateur_epilogue& epilogue, const secateur_plan& plan);
  int32_t (*max_pool2d)(const secateur_convolution& shape, const float* x, float* y, const secateur_plan& plan);
};

#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kernels_v2, kernels_v3, kernels_v4;
#elif defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels kernels_neon;
#endif

}  // namespace secateur
