// What a sum goes through on its way out. NaN comes out as NaN, as it does in torch.
#pragma once

#include "secateur_sparse.h"
#include "simd.h"

namespace secateur {
namespace {

// x Phi(x). The complementary error function is t p(t) exp(-z^2) with t = 1 / (1 + z / 2) and a polynomial fitted to
// its smallest relative error, 4e-8, so that the far negative side keeps its digits.
template <int L>
SECATEUR_INLINE vec<L> gelu(vec<L> x) {
  const vec<L> z = (x < 0.0f ? -x : x) * 0.70710678f;
  const vec<L> t = 1.0f / (1.0f + 0.5f * z);
  vec<L> p = splat<L>(-0.05889091368f);
  p = p * t + 0.2837025965f;
  p = p * t - 0.485384909f;
  p = p * t + 0.2759793999f;
  p = p * t - 0.02517844244f;
  p = p * t + 0.2020701108f;
  p = p * t + 0.243260949f;
  p = p * t + 0.2823534906f;
  p = p * t + 0.2820876761f;
  const vec<L> half = 0.5f * x * (p * t * exponential<L>(-z * z));
  const vec<L> near = x < 0.0f ? half : x - half;
  return z > 13.0f ? (x < 0.0f ? x * 0.0f : x) : near;
}

template <int L>
SECATEUR_INLINE vec<L> silu(vec<L> x) {
  return x / (1.0f + exponential<L>(-x));
}

template <int L>
SECATEUR_INLINE vec<L> gelu_tanh(vec<L> x) {
  const vec<L> u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential<L>(-2.0f * u));
}

template <int L>
SECATEUR_INLINE vec<L> relu(vec<L> x) {
  return x < 0.0f ? vec<L>{} : x;
}

template <int L>
SECATEUR_INLINE vec<L> relu6(vec<L> x) {
  const vec<L> y = relu<L>(x);
  return y > 6.0f ? splat<L>(6.0f) : y;
}

template <int L>
SECATEUR_INLINE vec<L> activate(vec<L> x, int32_t activation) {
  switch (activation) {
    case SECATEUR_RELU: return relu<L>(x);
    case SECATEUR_RELU6: return relu6<L>(x);
    case SECATEUR_GELU: return gelu<L>(x);
    case SECATEUR_GELU_TANH: return gelu_tanh<L>(x);
    case SECATEUR_SILU: return silu<L>(x);
    default: return x;
  }
}

__attribute__((noinline)) inline void activate_row(float* y, int64_t count, int32_t activation) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store_loose<kWidth>(y + i, activate<kWidth>(load_loose<kWidth>(y + i), activation));
  for (; i < count; ++i) y[i] = activate<4>(splat<4>(y[i]), activation)[0];
}

}  // namespace
}  // namespace secateur
