// What a sum goes through on its way out. NaN comes out as NaN, as it does in torch.
#pragma once

#include "secateur_sparse.h"
#include "simd.h"

namespace secateur {
namespace {

// x Phi(x) by the error function, which is a fraction of two polynomials in z^2 as far as 3.92, fitted to its smallest
// error, 2e-8, and 1 in float32 from there on.
template <int L>
SECATEUR_INLINE vec<L> gelu(vec<L> x) {
  const vec<L> z = x * 0.70710678f;
  vec<L> y = z < -3.92f ? splat<L>(-3.92f) : z;
  y = y > 3.92f ? splat<L>(3.92f) : y;
  const vec<L> t = y * y;
  vec<L> p = splat<L>(2.034727226e-06f), q = splat<L>(3.807059925e-05f);
  p = p * t + 2.874801359e-04f;
  q = q * t + 1.188123997e-03f;
  p = p * t + 3.868364849e-03f;
  q = q * t + 1.517237182e-02f;
  p = p * t + 5.306059833e-02f;
  q = q * t + 1.150849854e-01f;
  p = p * t + 1.927649446e-01f;
  q = q * t + 5.041651509e-01f;
  p = p * t + 1.128379020e+00f;
  q = q * t + 1.0f;
  vec<L> erf = y * p * reciprocal<L>(q);
  erf = z > 3.92f ? splat<L>(1.0f) : (z < -3.92f ? splat<L>(-1.0f) : erf);
  return 0.5f * x * (1.0f + erf);
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
