// The kernels of one instruction set; compiled several times, with SECATEUR_KERNELS, SECATEUR_NAME and the flags of each.

#include "kernels.h"

#include "channelwise.h"
#include "conv.h"
#include "gemv.h"
#include "spmm.h"

namespace secateur {
namespace {

bool usable() {
#if defined(__x86_64__) || defined(_M_X64)
  // Part by part: what the compilers call x86-64-v4 is younger than the processors.
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
#endif
#else
  return true;
#endif
}

}  // namespace

const Kernels SECATEUR_KERNELS = {SECATEUR_NAME, usable, spmm, gemv, gemv_bitmask, conv2d, depthwise2d, max_pool2d};

}  // namespace secateur
