// Vectors of a fixed number of floats by the compiler's vector extensions: the same source for every instruction set.
//
// These files are compiled once per instruction set. Everything in them has internal linkage, and no template of the
// standard library is used: the linker would keep one copy of an inline function for all, with instructions that some
// processors do not have.
#pragma once

#include <cstdint>
#include <cstring>

namespace secateur {
namespace {

template <int L>
struct Vector;

#define SECATEUR_VECTOR(L)                                                              \
  template <>                                                                           \
  struct Vector<L> {                                                                    \
    typedef float type __attribute__((vector_size(L * 4), may_alias));                  \
    typedef float loose __attribute__((vector_size(L * 4), may_alias, aligned(4)));     \
    typedef int32_t whole __attribute__((vector_size(L * 4), may_alias));               \
  };
SECATEUR_VECTOR(4)
SECATEUR_VECTOR(8)
SECATEUR_VECTOR(16)
#undef SECATEUR_VECTOR

template <int L>
using vec = typename Vector<L>::type;
template <int L>
using ints = typename Vector<L>::whole;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

#define SECATEUR_INLINE inline __attribute__((always_inline))

template <int L>
SECATEUR_INLINE vec<L> load(const float* p) {  // aligned to the vector's size
  return *reinterpret_cast<const vec<L>*>(p);
}
template <int L>
SECATEUR_INLINE void store(float* p, vec<L> v) {
  *reinterpret_cast<vec<L>*>(p) = v;
}
template <int L>
SECATEUR_INLINE vec<L> load_loose(const float* p) {
  return *reinterpret_cast<const typename Vector<L>::loose*>(p);
}
template <int L>
SECATEUR_INLINE void store_loose(float* p, vec<L> v) {
  *reinterpret_cast<typename Vector<L>::loose*>(p) = v;
}
template <int L>
SECATEUR_INLINE vec<L> splat(float value) {
  return vec<L>{} + value;
}

// Lanes of two vectors, by number: a's first, then b's.
#if defined(__clang__) || __GNUC__ >= 12
#define SECATEUR_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SECATEUR_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, ints<4>{i, j, k, l})
#endif

SECATEUR_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SECATEUR_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// exp(x) within about 2 units in the last place; inf above 88.72, 0 in the far negative, NaN for NaN.
template <int L>
SECATEUR_INLINE vec<L> exponential(vec<L> x) {
  const vec<L> low = splat<L>(-87.33654f), high = splat<L>(88.72283f);
  vec<L> y = x < low ? low : x;
  y = y > high ? high : y;
  const vec<L> magic = splat<L>(12582912.0f);  // adding 1.5 * 2^23 rounds to whole numbers
  const vec<L> n = (y * 1.44269504f + magic) - magic;
  const vec<L> r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  vec<L> p = splat<L>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // In two steps: 2^128 is not a number, half of it twice is.
  const ints<L> k = __builtin_convertvector(n == n ? n : vec<L>{}, ints<L>);
  const ints<L> half = k >> 1;
  const vec<L> a = (vec<L>)((half + 127) << 23), b = (vec<L>)((k - half + 127) << 23);
  const vec<L> out = p * a * b;
  const vec<L> beyond = splat<L>(__builtin_inff());
  return x > high ? beyond : (x < splat<L>(-103.97f) ? vec<L>{} : out);
}

}  // namespace
}  // namespace secateur
