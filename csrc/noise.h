// z(seed, parameter, element): the one definition of the noise, for g++, nvcc and NVRTC. No #include at all.
//
// Only u32 mul/xor/add/shift/and/or, look-ups, i32 -> f32 and IEEE-754 binary32 mul/add/fma (and sqrt in layout 1), all
// rounded to nearest even: no libm, no division, no approximation, so the bits are the same on every device. What would
// break that is a compiler allowed to reorder or contract floating point, hence the #error below and the self-check at
// load.
//
// Formulas are templates over an arithmetic backend B (B::U 32-bit words, B::F floats): one element at a time here
// (ZoScalar, host and CUDA), SIMD vectors in cpu_avx2.cpp and cpu_avx512.cpp.
// Layout of the streams: zo_offload/numerics/noise.py.
// Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#ifndef ZO_NOISE_H
#define ZO_NOISE_H

#if defined(__FAST_MATH__) && !defined(ZO_TEST_FAST_MATH)
#error "zo_offload must not be built with -ffast-math or -Ofast: the noise would differ from every other build"
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define ZO_HD __host__ __device__ __forceinline__
#define ZO_UNROLL _Pragma("unroll")
#else
#define ZO_HD inline __attribute__((always_inline))
#define ZO_UNROLL _Pragma("GCC unroll 16")
#endif

typedef unsigned char zo_u8;
typedef unsigned short zo_u16;
typedef unsigned int zo_u32;
typedef int zo_i32;
typedef unsigned long long zo_u64;
typedef long long zo_i64;

#define ZO_LAYOUT_VERSION 2  // the newest; layout 1 has another Gaussian

#define ZO_PHILOX_M0 0xD2511F53u
#define ZO_PHILOX_M1 0xCD9E8D57u
#define ZO_PHILOX_W0 0x9E3779B9u
#define ZO_PHILOX_W1 0xBB67AE85u

// stream tags, counter word 3
enum { ZO_TAG_BOX_MULLER = 0, ZO_TAG_RADEMACHER = 1, ZO_TAG_ROUNDING = 2, ZO_TAG_SEED = 3, ZO_TAG_GAUSSIAN = 4,
       ZO_TAG_MASK = 5, ZO_TAG_COLUMNS = 6 };
// what a pass may ask for; Box-Muller is the Gaussian of layout 1
enum { ZO_BOX_MULLER = 0, ZO_RADEMACHER = 1, ZO_GAUSSIAN = 2, ZO_NUM_NOISES = 3 };

struct zo_words {
  zo_u32 w[4];
};

// a * b as two words. nvcc left to itself keeps Philox's words in 64-bit registers and multiplies those.
ZO_HD void zo_multiply(zo_u32 a, zo_u32 b, zo_u32& low, zo_u32& high) {
#if defined(__CUDA_ARCH__)
  zo_u64 p;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  asm("mov.b64 {%0, %1}, %2;" : "=r"(low), "=r"(high) : "l"(p));
#else
  const zo_u64 p = (zo_u64)a * b;
  low = (zo_u32)p;
  high = (zo_u32)(p >> 32);
#endif
}

// Rounds FROM..TO-1 of Philox on the four words in place.
template <int FROM, int TO>
ZO_HD void zo_philox_rounds(zo_u32 (&c)[4], zo_u64 seed) {
  zo_u32 k0 = (zo_u32)seed + FROM * ZO_PHILOX_W0, k1 = (zo_u32)(seed >> 32) + FROM * ZO_PHILOX_W1;
  ZO_UNROLL
  for (int r = FROM; r < TO; ++r) {
    zo_u32 low0, high0, low1, high1;
    zo_multiply(ZO_PHILOX_M0, c[0], low0, high0);
    zo_multiply(ZO_PHILOX_M1, c[2], low1, high1);
    c[0] = high1 ^ c[1] ^ k0;
    c[2] = high0 ^ c[3] ^ k1;
    c[1] = low1;
    c[3] = low0;
    k0 += ZO_PHILOX_W0;
    k1 += ZO_PHILOX_W1;
  }
}

template <int R>
ZO_HD zo_words zo_philox(zo_u64 block, zo_u32 word2, zo_u32 word3, zo_u64 seed) {
  zo_words out = {{(zo_u32)block, (zo_u32)(block >> 32), word2, word3}};
  zo_philox_rounds<0, R>(out.w, seed);
  return out;
}

// One element at a time. Comparisons and selects are by bits, so that a SIMD backend can mean the same.
struct ZoScalar {
  typedef zo_u32 U;
  typedef float F;
  static ZO_HD U u(zo_u32 x) { return x; }
  static ZO_HD F f(float x) { return x; }
  static ZO_HD U or_(U a, U b) { return a | b; }
  static ZO_HD U and_(U a, U b) { return a & b; }
  static ZO_HD U xor_(U a, U b) { return a ^ b; }
  // (a & mask) | bits, and a ^ (b & mask): one instruction where there is one of three operands
  static ZO_HD U and_or(U a, U mask, U bits) { return (a & mask) | bits; }
  static ZO_HD U xor_and(U a, U b, U mask) { return a ^ (b & mask); }
  static ZO_HD U add_u(U a, U b) { return a + b; }
  static ZO_HD U sub_u(U a, U b) { return a - b; }
  template <int N> static ZO_HD U shl(U a) { return a << N; }
  template <int N> static ZO_HD U shr(U a) { return a >> N; }
  // a < b ? x : y, a and b signed
  static ZO_HD U select_less(U a, U b, U x, U y) { return (zo_i32)a < (zo_i32)b ? x : y; }
  // the larger, both signed
  static ZO_HD U most_u(U a, U b) { return (zo_i32)a > (zo_i32)b ? a : b; }
  // a > b ? x : y; false with a NaN
  static ZO_HD U select_greater(F a, F b, U x, U y) { return a > b ? x : y; }
  // of numbers, not NaN
  static ZO_HD F least(F a, F b) { return a < b ? a : b; }
  static ZO_HD F most(F a, F b) { return a > b ? a : b; }
  // of a number, not NaN
  static ZO_HD F clamp(F x, float low, float high) { return x < low ? low : x > high ? high : x; }
  // v is NaN ? x : y
  static ZO_HD U select_nan(F v, U x, U y) { return (bits(v) & 0x7fffffffu) > 0x7f800000u ? x : y; }
#if defined(__CUDA_ARCH__)
  static ZO_HD F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  static ZO_HD F mul(F a, F b) { return __fmul_rn(a, b); }
  static ZO_HD F add(F a, F b) { return __fadd_rn(a, b); }
  static ZO_HD F sqrt(F a) { return __fsqrt_rn(a); }
  static ZO_HD F divide(F a, F b) { return __fdiv_rn(a, b); }
  static ZO_HD F to_float(U a) { return __int2float_rn((zo_i32)a); }
  static ZO_HD U truncate(F a) { return (U)__float2int_rz(a); }
  static ZO_HD U bits(F a) { return __float_as_uint(a); }
  static ZO_HD F value(U a) { return __uint_as_float(a); }
#else
  static ZO_HD F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static ZO_HD F mul(F a, F b) { return a * b; }  // built with -ffp-contract=off
  static ZO_HD F add(F a, F b) { return a + b; }
  static ZO_HD F sqrt(F a) { return __builtin_sqrtf(a); }
  static ZO_HD F divide(F a, F b) { return a / b; }
  static ZO_HD F to_float(U a) { return (float)(zo_i32)a; }
  static ZO_HD U truncate(F a) { return (U)(zo_i32)a; }
  static ZO_HD U bits(F a) {
    U r;
    __builtin_memcpy(&r, &a, 4);
    return r;
  }
  static ZO_HD F value(U a) {
    F r;
    __builtin_memcpy(&r, &a, 4);
    return r;
  }
#endif
};

// The Gaussian of layout 2: sixteen random bits a normal. Bit 15 is the sign; the others, m, are how far |z| lies from the
// outermost of 2^15 values of equal chance. |z| is a cubic in a = (2 m + 1) 2^15, one for each octave of a: a is small
// where |z| is large, so the tail has the fine octaves. Rows by the lower four bits of a's exponent, coefficients by
// power, as float32 bits; found by benchmarks/noise_table.py.
// |z| <= 4.41, E z^2 = 1 + 8e-9, E z^4 = 3 + 7e-8 over the 65,536 inputs; strictly monotone, never 0. No coefficient times a
// power of a is subnormal, so flushing to zero would not change it.
#define ZO_GAUSSIAN_ROWS(ROW)                          \
  ROW(0x40852F59, 0xB5A7C401, 0x00000000, 0x00000000)  \
  ROW(0x40865178, 0xB5FD03EB, 0x2C26BBC4, 0xA1C4D05B)  \
  ROW(0x4081421C, 0xB5843F17, 0x2B2ECB71, 0xA04EDBA2)  \
  ROW(0x40781814, 0xB50B0308, 0x2A389800, 0x9EDBA83A)  \
  ROW(0x406D2E55, 0xB491CCC2, 0x29412698, 0x9D65AC8C)  \
  ROW(0x4061CC62, 0xB4197778, 0x284A9F5F, 0x9BF0CE7C)  \
  ROW(0x4055E2D9, 0xB3A23D7E, 0x27552375, 0x9A7D0FF8)  \
  ROW(0x40496114, 0xB32C8389, 0x266118F5, 0x990576AB)  \
  ROW(0x403C3196, 0xB2B8CFE9, 0x256EECEC, 0x978D7314)  \
  ROW(0x402E3926, 0xB247E644, 0x247F1F4D, 0x9616CC30)  \
  ROW(0x401F5525, 0xB1DAF261, 0x23891930, 0x94A1E263)  \
  ROW(0x400F5A04, 0xB173DF55, 0x229439EC, 0x932F5721)  \
  ROW(0x3FFC28DF, 0xB10B0F35, 0x21A0B0B3, 0x91C1AE4D)  \
  ROW(0x3FD72E34, 0xB0A5C336, 0x20B2C865, 0x9079C0B8)  \
  ROW(0x408D1D9C, 0x00000000, 0x00000000, 0x00000000)  \
  ROW(0x4082928C, 0x00000000, 0x00000000, 0x00000000)

// a of a half-word that lies in the upper half of s
template <class B>
ZO_HD typename B::F zo_gaussian_argument(typename B::U s) {
  return B::to_float(B::and_or(s, B::u(0x7fff0000u), B::u(0x8000u)));
}

// z of the half-word in the upper half of s. coefficient(k): that of power k, in a's row.
template <class B, class Coefficient>
ZO_HD typename B::F zo_gaussian(typename B::U s, typename B::F a, Coefficient coefficient) {
  typename B::F z = coefficient(3);
  z = B::fma(z, a, coefficient(2));
  z = B::fma(z, a, coefficient(1));
  z = B::fma(z, a, coefficient(0));
  return B::value(B::xor_and(B::bits(z), s, B::u(0x80000000u)));
}

// The Gaussian of layout 1, Box-Muller on two random words: 32 simple operations for two normals, error of the transform below 2e-6 of the
// radius, |z| <= 6.556.
template <class B>
ZO_HD void zo_gaussian_pair(typename B::U a, typename B::U b, typename B::F& z0, typename B::F& z1) {
  typedef typename B::U U;
  typedef typename B::F F;
  // radius r = sqrt(-2 ln u), u = |f| * 2^-31 in [2^-31, 1]; f < 0 and odd before rounding, so u is never 0
  F f = B::to_float(B::or_(a, B::u(0x80000001u)));
  U ix = B::bits(f);
  U e = B::and_(B::sub_u(ix, B::u(0x80000000u + 0x3f3504f3u + (31u << 23))), B::u(0xff800000u));
  F t = B::fma(B::value(B::sub_u(ix, e)), B::f(-4.656612873e-10f), B::f(-1.0f));  // m - 1, m in [sqrt(1/2), sqrt(2))
  F q = B::f(-2.379220873e-01f);
  q = B::fma(q, t, B::f(3.733570874e-01f));
  q = B::fma(q, t, B::f(-4.099265933e-01f));
  q = B::fma(q, t, B::f(4.981948733e-01f));
  q = B::fma(q, t, B::f(-6.662901640e-01f));
  q = B::fma(q, t, B::f(1.000022292e+00f));
  q = B::fma(q, t, B::f(-2.000001907e+00f));
  F r = B::sqrt(B::fma(B::to_float(e), B::f(-1.652591664e-07f), B::mul(q, t)));  // -2 ln(2) 2^-23 an exponent step
  // angle v * pi/2, v in [-1, 1); the cosine's sign is a bit v does not use
  F v = B::add(B::value(B::or_(B::template shr<9>(b), B::u(0x40000000u))), B::f(-3.0f));
  F y = B::mul(v, v);
  F s = B::f(-4.362469073e-03f);
  s = B::fma(s, y, B::f(7.948765159e-02f));
  s = B::fma(s, y, B::f(-6.459209919e-01f));
  s = B::fma(s, y, B::f(1.570794821e+00f));
  F c = B::f(8.581906441e-04f);
  c = B::fma(c, y, B::f(-2.081062831e-02f));
  c = B::fma(c, y, B::f(2.536507547e-01f));
  c = B::fma(c, y, B::f(-1.233698249e+00f));
  c = B::fma(c, y, B::f(9.999999404e-01f));
  z0 = B::value(B::xor_(B::bits(B::mul(r, c)), B::template shl<31>(b)));
  z1 = B::mul(B::mul(r, v), s);
}

// Element i of that stream lies in block i >> 2.
template <int R>
ZO_HD void zo_box_muller_block(zo_u64 block, zo_u32 param_id, zo_u64 seed, float z[4]) {
  zo_words w = zo_philox<R>(block, param_id, ZO_TAG_BOX_MULLER, seed);
  zo_gaussian_pair<ZoScalar>(w.w[0], w.w[1], z[0], z[1]);
  zo_gaussian_pair<ZoScalar>(w.w[2], w.w[3], z[2], z[3]);
}

// Gaussian: element i, j = i & 7, is half j >> 2 (0 the low one) of word (j & 3) ^ 1 of block i >> 3. The last round leaves
// words 1, 0 and 3, 2 side by side in 64-bit SIMD lanes, hence this order.
// Rademacher: element i is bit i & 31 of word (i >> 5) & 3 of block i >> 7, set for -1.
// Rounding: element i has half-word i & 7 (low half of a word first) of block i >> 3.

#endif
