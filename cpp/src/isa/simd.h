// Vectors of a fixed number of floats by the compiler's vector extensions: the same source for every instruction set.
//
// These files are compiled once per instruction set. Everything in them has internal linkage, and no template of the
// standard library is used: the linker would keep one copy of an inline function for all, with instructions that some
// processors do not have.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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
// A place that is one register, and not the sum of two: an instruction that multiplies what it reads from such a sum takes
// twice the room in the processor.
SECATEUR_INLINE const float* in_register(const float* p) {
  asm("" : "+r"(p));
  return p;
}
template <int L>
SECATEUR_INLINE vec<L> splat(float value) {
  return vec<L>{} + value;
}

#if defined(__clang__) || __GNUC__ >= 12
#define SECATEUR_SHUFFLE(L, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SECATEUR_SHUFFLE(L, a, b, ...) __builtin_shuffle(a, b, ints<L>{__VA_ARGS__})
#endif

// L / 4 runs of four floats, `step` apart, in one vector.
template <int L>
SECATEUR_INLINE vec<L> load_groups(const float* p, int64_t step) {
  if constexpr (L == 4) {
    return load_loose<4>(p);
  } else {
    typedef typename Vector<L / 2>::type half;
    const half a = load_groups<L / 2>(p, step), b = load_groups<L / 2>(p + L / 8 * step, step);
#if defined(__clang__) || __GNUC__ >= 12
    if constexpr (L == 8)
      return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
    else
      return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    half both[2] = {a, b};
    vec<L> whole;
    std::memcpy(&whole, both, sizeof whole);
    return whole;
#endif
  }
}

// Lanes i, j, k, l of every group of four lanes: those of a are 0 to 3, those of b 4 to 7.
template <int L, int I, int J, int K, int M>
SECATEUR_INLINE vec<L> groups(vec<L> a, vec<L> b) {
#define SECATEUR_LANE(n, i) 4 * n + (i < 4 ? i : L + i - 4)
#define SECATEUR_GROUP(n) SECATEUR_LANE(n, I), SECATEUR_LANE(n, J), SECATEUR_LANE(n, K), SECATEUR_LANE(n, M)
  if constexpr (L == 4)
    return SECATEUR_SHUFFLE(L, a, b, SECATEUR_GROUP(0));
  else if constexpr (L == 8)
    return SECATEUR_SHUFFLE(L, a, b, SECATEUR_GROUP(0), SECATEUR_GROUP(1));
  else
    return SECATEUR_SHUFFLE(L, a, b, SECATEUR_GROUP(0), SECATEUR_GROUP(1), SECATEUR_GROUP(2), SECATEUR_GROUP(3));
#undef SECATEUR_GROUP
#undef SECATEUR_LANE
}

// Groups I and J of four lanes of a, then K and M of b; of vectors with two groups the first of each pair.
template <int L, int I, int J, int K, int M>
SECATEUR_INLINE vec<L> whole_groups(vec<L> a, vec<L> b) {
#define SECATEUR_WHOLE(n) 4 * (n), 4 * (n) + 1, 4 * (n) + 2, 4 * (n) + 3
  if constexpr (L == 16)
    return SECATEUR_SHUFFLE(L, a, b, SECATEUR_WHOLE(I), SECATEUR_WHOLE(J), SECATEUR_WHOLE(4 + K), SECATEUR_WHOLE(4 + M));
  else
    return SECATEUR_SHUFFLE(L, a, b, SECATEUR_WHOLE(I), SECATEUR_WHOLE(2 + K));
#undef SECATEUR_WHOLE
}

// Lanes O, O + 2, ... of two vectors, one behind the other.
template <int L, int O>
SECATEUR_INLINE vec<L> every_second(vec<L> a, vec<L> b) {
  if constexpr (L == 4)
    return SECATEUR_SHUFFLE(L, a, b, O, O + 2, O + 4, O + 6);
  else if constexpr (L == 8)
    return SECATEUR_SHUFFLE(L, a, b, O, O + 2, O + 4, O + 6, O + 8, O + 10, O + 12, O + 14);
  else
    return SECATEUR_SHUFFLE(L, a, b, O, O + 2, O + 4, O + 6, O + 8, O + 10, O + 12, O + 14, O + 16, O + 18, O + 20, O + 22,
                            O + 24, O + 26, O + 28, O + 30);
}

SECATEUR_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SECATEUR_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// 1 / x for normal numbers, within about a unit in the last place.
template <int L>
SECATEUR_INLINE vec<L> reciprocal(vec<L> x) {
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const vec<L> r = (vec<L>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return r * (2.0f - x * r);
  }
#endif
  return 1.0f / x;
}

// exp(x) within about 2 units in the last place; inf above 88.72, 0 below -87.34, NaN for NaN: subnormal results would
// take a hundred times as long.
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
  return x > high ? beyond : (x < low ? vec<L>{} : out);
}

}  // namespace
}  // namespace secateur
