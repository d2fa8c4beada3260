// Storage formats, bits <-> float32, as templates over an arithmetic backend (noise.h). No #include but noise.h.
// What each is good for, its error and its range: zo_offload/formats/.
//
// Encoding rounds to nearest even, or stochastically against 16 random bits r in [0, 65536): the value goes up with a
// chance equal to the part that is dropped. Defined on integers, so subnormals come out right whatever the rounding
// and flush modes. Infinities stay; every NaN becomes the one quiet NaN of the format, because a NaN's payload is the
// one thing devices disagree on.
//
// Formats with groups have one scale for each `group` consecutive elements of the parameter. Their codes are made from
// value / scale, which is finite and inside the format's range: where a group holds a NaN or an infinity its scale is
// NaN and its codes are 0. Functions of a whole group (zo_fp8_exponent, zo_int8_scale, ...) take its largest magnitude
// as bits, so that a NaN is above infinity and infinity above every number; they are plain scalars on every device.
//
// Split formats keep a master in two halves: coarse = master rounded to fewer bits, half away from zero (int8: half
// up), residual = the master's low bits; master = (coarse << bits) + signed residual, in integers.
#ifndef ZO_FORMATS_H
#define ZO_FORMATS_H
#include "noise.h"

// One row a format, as its class in zo_offload/formats/ says (a test compares):
//   kernels' name, code's name, code; bits an element in the values plane; bytes of a group's scale (0: no groups) and of
//   its minimum; bytes an element in the residual plane (0: not split); whether its values train, whether its scales do
#define ZO_FORMATS(ROW)                           \
  ROW(fp32, FP32, 0, 32, 0, 0, 0, 1, 0)           \
  ROW(bf16, BF16, 1, 16, 0, 0, 0, 1, 0)           \
  ROW(fp16, FP16, 2, 16, 0, 0, 0, 1, 0)           \
  ROW(fp8_e4m3, FP8_E4M3, 3, 8, 1, 0, 0, 1, 0)    \
  ROW(fp8_e5m2, FP8_E5M2, 4, 8, 1, 0, 0, 1, 0)    \
  ROW(int8, INT8, 5, 8, 4, 0, 0, 1, 1)            \
  ROW(int4, INT4, 6, 4, 4, 2, 0, 0, 1)            \
  ROW(nf4, NF4, 7, 4, 4, 0, 0, 0, 1)              \
  ROW(bf16_16, BF16_16, 8, 16, 0, 0, 2, 1, 0)     \
  ROW(bf16_8, BF16_8, 9, 16, 0, 0, 1, 1, 0)       \
  ROW(int8_8, INT8_8, 10, 8, 4, 0, 1, 1, 0)       \
  ROW(fp8_8, FP8_8, 11, 8, 1, 0, 1, 1, 0)         \
  ROW(int4f, INT4F, 12, 4, 4, 4, 0, 0, 0)         \
  ROW(int8f, INT8F, 13, 8, 4, 4, 0, 0, 0)         \
  ROW(fp8f, FP8F, 14, 8, 4, 0, 0, 0, 0)           \
  ROW(mxfp4, MXFP4, 15, 4, 1, 0, 0, 0, 0)         \
  ROW(nvfp4, NVFP4, 16, 4, 4, 0, 0, 0, 0)         \
  ROW(fp4, FP4, 17, 4, 4, 0, 0, 0, 0)             \
  ROW(mxfp4_across, MXFP4_ACROSS, 18, 4, 1, 0, 0, 0, 0) \
  ROW(nvfp4_two, NVFP4_TWO, 19, 4, 1, 4, 0, 0, 0) \
  ROW(int8_127, INT8_127, 20, 8, 4, 0, 0, 0, 0)

#define ZO_CODE(NAME, CODE, NUMBER, ...) ZO_##CODE = NUMBER,
enum { ZO_FORMATS(ZO_CODE) };
#undef ZO_CODE
#define ZO_COUNT(...) +1
enum { ZO_NUM_FORMATS = 0 ZO_FORMATS(ZO_COUNT) };
#undef ZO_COUNT

ZO_HD bool zo_is_plain(int format) { return format <= ZO_FP16; }  // those of lanes, too
// those that hold a quantized checkpoint's own codes: nothing is encoded into them
ZO_HD bool zo_is_kept(int format) { return format >= ZO_INT4F; }
// elements a scale
ZO_HD bool zo_is_group(zo_u32 group) { return group == 16 || group == 32 || group == 64 || group == 128; }

#define ZO_FACT(FUNCTION, VALUE)                  \
  ZO_HD int FUNCTION(int format) {                \
    switch (format) { ZO_FORMATS(VALUE) }         \
    return 0;                                     \
  }
#define ZO_BITS(NAME, CODE, NUMBER, BITS, ...) \
  case NUMBER: return BITS;
#define ZO_SCALE(NAME, CODE, NUMBER, BITS, SCALE, ...) \
  case NUMBER: return SCALE;
#define ZO_MINIMUM(NAME, CODE, NUMBER, BITS, SCALE, MINIMUM, ...) \
  case NUMBER: return MINIMUM;
#define ZO_RESIDUAL(NAME, CODE, NUMBER, BITS, SCALE, MINIMUM, RESIDUAL, ...) \
  case NUMBER: return RESIDUAL;
#define ZO_TRAINS(NAME, CODE, NUMBER, BITS, SCALE, MINIMUM, RESIDUAL, TRAINS, SCALES) \
  case NUMBER: return TRAINS;
#define ZO_TRAINS_SCALES(NAME, CODE, NUMBER, BITS, SCALE, MINIMUM, RESIDUAL, TRAINS, SCALES) \
  case NUMBER: return SCALES;
ZO_FACT(zo_format_bits, ZO_BITS)
ZO_FACT(zo_scale_bytes, ZO_SCALE)
ZO_FACT(zo_minimum_bytes, ZO_MINIMUM)
ZO_FACT(zo_residual_bytes, ZO_RESIDUAL)
ZO_FACT(zo_trains, ZO_TRAINS)
ZO_FACT(zo_trains_scales, ZO_TRAINS_SCALES)
#undef ZO_FACT
#undef ZO_BITS
#undef ZO_SCALE
#undef ZO_MINIMUM
#undef ZO_RESIDUAL
#undef ZO_TRAINS
#undef ZO_TRAINS_SCALES

// Bytes of scales and minima that a group has for itself: in two formats they are shared in other ways, see below.
ZO_HD int zo_own_scale_bytes(int format) { return format == ZO_MXFP4_ACROSS ? 0 : zo_scale_bytes(format); }
ZO_HD int zo_own_minimum_bytes(int format) { return format == ZO_NVFP4_TWO ? 0 : zo_minimum_bytes(format); }

// bytes of a plain format's element
ZO_HD int zo_format_bytes(int format) { return zo_format_bits(format) / 8; }

template <class B>
ZO_HD typename B::U zo_fp32_round(typename B::F x) {
  return B::select_nan(x, B::u(0x7fc00000u), B::bits(x));
}

// bf16 is the upper half of a float: these return it there, with rubbish in the lower half.
template <class B>
ZO_HD typename B::U zo_bf16_round(typename B::F x) {
  typename B::U u = B::bits(x);
  typename B::U odd = B::and_(B::template shr<16>(u), B::u(1));
  return B::select_nan(x, B::u(0x7fc00000u), B::add_u(B::add_u(u, B::u(0x7fff)), odd));
}

template <class B>
ZO_HD typename B::U zo_bf16_round_stochastic(typename B::F x, typename B::U r) {
  // an infinity has 16 zero bits below: r cannot carry
  return B::select_nan(x, B::u(0x7fc00000u), B::add_u(B::bits(x), r));
}

template <class B>
ZO_HD typename B::F zo_bf16_value(typename B::U rounded) {
  return B::value(B::and_(rounded, B::u(0xffff0000u)));
}

template <class B>
ZO_HD typename B::F zo_fp16_decode(typename B::U h) {
  typedef typename B::U U;
  U m = B::and_(h, B::u(0x7fff)), sign = B::template shl<16>(B::and_(h, B::u(0x8000))), wide = B::template shl<13>(m);
  U normal = B::add_u(wide, B::u(112u << 23));
  // 2^-14 + m * 2^-24, less 2^-14: exact, and never a float32 subnormal
  U tiny = B::bits(B::add(B::value(B::add_u(wide, B::u(113u << 23))), B::f(-6.103515625e-05f)));
  U special = B::or_(wide, B::u(0x7f800000u));
  U bits = B::select_less(m, B::u(0x400), tiny, B::select_less(m, B::u(0x7c00), normal, special));
  return B::value(B::or_(bits, sign));
}

template <class B>
ZO_HD typename B::U zo_fp16_finish(typename B::F x, typename B::U magnitude, typename B::U bits) {
  typename B::U top = B::u(0x7c00);
  typename B::U code = B::or_(B::select_less(magnitude, top, magnitude, top),
                              B::and_(B::template shr<16>(bits), B::u(0x8000)));
  return B::select_nan(x, B::u(0x7e00), code);
}

template <class B>
ZO_HD typename B::U zo_fp16_round(typename B::F x) {
  typedef typename B::U U;
  U u = B::bits(x), a = B::and_(u, B::u(0x7fffffffu));
  U n = B::sub_u(a, B::u(112u << 23));
  n = B::template shr<13>(B::add_u(B::add_u(n, B::u(0xfff)), B::and_(B::template shr<13>(n), B::u(1))));
  // adding 0.5 puts the subnormal's last bit at the float's last bit: the addition rounds it
  U small = B::select_less(a, B::u(113u << 23), a, B::u(0));
  U s = B::sub_u(B::bits(B::add(B::value(small), B::f(0.5f))), B::u(0x3f000000u));
  return zo_fp16_finish<B>(x, B::select_less(a, B::u(113u << 23), s, n), u);
}

template <class B>
ZO_HD typename B::U zo_fp16_round_stochastic(typename B::F x, typename B::U r) {
  typedef typename B::U U;
  U u = B::bits(x), a = B::and_(u, B::u(0x7fffffffu));
  // normal: 13 bits are dropped, against the upper 13 random bits
  U n = B::template shr<13>(B::add_u(B::sub_u(a, B::u(112u << 23)), B::template shr<3>(r)));
  // subnormal: steps of 2^-24 with 16 fractional bits (what lies below them is cut), against all 16
  U small = B::select_less(a, B::u(113u << 23), a, B::u(0));
  U s = B::template shr<16>(B::add_u(B::truncate(B::mul(B::value(small), B::f(1099511627776.0f))), r));
  return zo_fp16_finish<B>(x, B::select_less(a, B::u(113u << 23), s, n), u);
}

// ---- small floats: magnitude codes of M mantissa bits and exponent bias BIAS; the sign is handled apart

template <class B, int M, int BIAS>
ZO_HD typename B::U zo_small_round(typename B::U magnitude) {
  typedef typename B::U U;
  const int DROP = 23 - M;
  const zo_u32 LEAST = (zo_u32)(128 - BIAS) << 23;  // smallest normal value
  U n = B::sub_u(magnitude, B::u((zo_u32)(127 - BIAS) << 23));
  n = B::template shr<DROP>(B::add_u(B::add_u(n, B::u((1u << (DROP - 1)) - 1)), B::and_(B::template shr<DROP>(n), B::u(1))));
  // the sum's last bit is worth one subnormal step: the addition rounds to it
  const zo_u32 MAGIC = (zo_u32)(127 + 1 - BIAS - M + 23) << 23;
  U small = B::select_less(magnitude, B::u(LEAST), magnitude, B::u(0));
  U s = B::sub_u(B::bits(B::add(B::value(small), B::value(B::u(MAGIC)))), B::u(MAGIC));
  return B::select_less(magnitude, B::u(LEAST), s, n);
}

template <class B, int M, int BIAS>
ZO_HD typename B::U zo_small_round_stochastic(typename B::U magnitude, typename B::U r) {
  typedef typename B::U U;
  const int DROP = 23 - M;
  const zo_u32 LEAST = (zo_u32)(128 - BIAS) << 23;
  U up;  // the uppermost DROP bits of the random ones
  if constexpr (DROP >= 16)
    up = B::template shl<DROP - 16>(r);
  else
    up = B::template shr<16 - DROP>(r);
  U n = B::template shr<DROP>(B::add_u(B::sub_u(magnitude, B::u((zo_u32)(127 - BIAS) << 23)), up));
  // subnormal: steps with 16 fractional bits (what lies below them is cut), against all 16
  U small = B::select_less(magnitude, B::u(LEAST), magnitude, B::u(0));
  typename B::F steps = B::mul(B::value(small), B::value(B::u((zo_u32)(127 + BIAS - 1 + M + 16) << 23)));
  U s = B::template shr<16>(B::add_u(B::truncate(steps), r));
  return B::select_less(magnitude, B::u(LEAST), s, n);
}

// ---- fp8: value = small float * 2^(b - 127), b one byte a group, 255 for NaN

#define ZO_NAN_EXPONENT 255u
#define ZO_LARGEST_EXPONENT 246u

// The least b with largest <= 1.75 * 2^TOP * 2^(b - 127); TOP: 8 for e4m3 (448), 15 for e5m2 (57344).
ZO_HD zo_u32 zo_fp8_exponent(zo_u32 largest_bits, int top) {
  if (largest_bits >= 0x7f800000u) return ZO_NAN_EXPONENT;
  const zo_i32 b = (zo_i32)((largest_bits + 0x1fffffu) >> 23) - top;  // one more where the mantissa is above 1.75
  return b < 1 ? 1u : b > (zo_i32)ZO_LARGEST_EXPONENT ? ZO_LARGEST_EXPONENT : (zo_u32)b;
}

ZO_HD int zo_fp8_top(int format) { return format == ZO_FP8_E5M2 ? 15 : 8; }

// 2^(b - 127); e4m3 goes through fp16, whose exponent bias is 8 more: its factor is 256 times that
ZO_HD float zo_fp8_factor(int format, zo_u32 b) {
  return ZoScalar::value(b == ZO_NAN_EXPONENT ? 0x7fc00000u : (b + (format == ZO_FP8_E5M2 ? 0 : 8)) << 23);
}

// 2^(127 - b), or 0 for NaN: every code of such a group is 0 (see zo_scaled)
ZO_HD float zo_fp8_inverse(zo_u32 b) { return ZoScalar::value(b == ZO_NAN_EXPONENT ? 0u : (254 - b) << 23); }

// value / scale. inverse == 0 stands for a NaN scale, and gives 0 for any value.
template <class B>
ZO_HD typename B::F zo_scaled(typename B::F x, float inverse) {
  return inverse == 0.0f ? B::f(0.0f) : B::mul(x, B::f(inverse));
}

// 8-bit code -> the same number as fp16, times 2^-8 for e4m3; NaN where torch has NaN
template <class B>
ZO_HD typename B::U zo_e4m3_half_of_signed(typename B::U code) {  // the code's bit 7 is in all bits above, too
  typename B::U half = B::and_(B::template shl<7>(code), B::u(0xbf80));
  // 0x7f alone carries into the upper exponent bit
  return B::or_(half, B::and_(B::add_u(half, B::u(0x80)), B::u(0x4000)));
}
template <class B>
ZO_HD typename B::U zo_e4m3_half(typename B::U code) {
  return zo_e4m3_half_of_signed<B>(B::sub_u(B::xor_(code, B::u(0x80)), B::u(0x80)));
}

template <class B>
ZO_HD typename B::U zo_e5m2_half(typename B::U code) {
  return B::template shl<8>(code);
}

// largest code, so that a magnitude beyond the range saturates
template <class B>
ZO_HD typename B::U zo_saturated(typename B::U magnitude, zo_u32 largest) {
  return B::select_less(magnitude, B::u(largest), magnitude, B::u(largest));
}

template <class B>
ZO_HD typename B::U zo_magnitude(typename B::F x) {
  return B::and_(B::bits(x), B::u(0x7fffffffu));
}

template <class B, int SHIFT>
ZO_HD typename B::U zo_with_sign(typename B::U code, typename B::F x) {
  return B::or_(code, B::and_(B::template shr<SHIFT>(B::bits(x)), B::u(0x80000000u >> SHIFT)));
}

// x: scaled, finite. The codes are torch's, saturating.
template <class B>
ZO_HD typename B::U zo_e4m3_round(typename B::F x) {
  return zo_with_sign<B, 24>(zo_saturated<B>(zo_small_round<B, 3, 7>(zo_magnitude<B>(x)), 0x7e), x);
}
template <class B>
ZO_HD typename B::U zo_e4m3_round_stochastic(typename B::F x, typename B::U r) {
  return zo_with_sign<B, 24>(zo_saturated<B>(zo_small_round_stochastic<B, 3, 7>(zo_magnitude<B>(x), r), 0x7e), x);
}
template <class B>
ZO_HD typename B::U zo_e5m2_round(typename B::F x) {
  return zo_with_sign<B, 24>(zo_saturated<B>(zo_small_round<B, 2, 15>(zo_magnitude<B>(x)), 0x7b), x);
}
template <class B>
ZO_HD typename B::U zo_e5m2_round_stochastic(typename B::F x, typename B::U r) {
  return zo_with_sign<B, 24>(zo_saturated<B>(zo_small_round_stochastic<B, 2, 15>(zo_magnitude<B>(x), r), 0x7b), x);
}

// the 16-bit master of fp8+8: e4m3 with 11 mantissa bits
template <class B>
ZO_HD typename B::U zo_fp8_master(typename B::F x) {
  return zo_with_sign<B, 16>(zo_saturated<B>(zo_small_round<B, 11, 7>(zo_magnitude<B>(x)), 0x7e00), x);
}
template <class B>
ZO_HD typename B::U zo_fp8_master_stochastic(typename B::F x, typename B::U r) {
  return zo_with_sign<B, 16>(zo_saturated<B>(zo_small_round_stochastic<B, 11, 7>(zo_magnitude<B>(x), r), 0x7e00), x);
}

// master code -> number; times zo_fp8_factor / 256. A float32 of the same digits has 120 more exponent bias; below the
// smallest normal value, 2^-6 + m * 2^-17 less 2^-6 is exact.
template <class B>
ZO_HD typename B::F zo_fp8_master_value(typename B::U code) {
  typedef typename B::U U;
  U m = B::and_(code, B::u(0x7fff)), sign = B::template shl<16>(B::and_(code, B::u(0x8000))), wide = B::template shl<12>(m);
  U normal = B::add_u(wide, B::u(120u << 23));
  U tiny = B::bits(B::add(B::value(B::add_u(wide, B::u(121u << 23))), B::f(-0.015625f)));
  return B::value(B::or_(B::select_less(m, B::u(0x800), tiny, normal), sign));
}

// ---- splits: codes of N residual bits

template <class B, int N>
ZO_HD typename B::U zo_coarse(typename B::U master) {
  return B::template shr<N>(B::add_u(master, B::u(1u << (N - 1))));
}

// low: the residual, zero-extended
template <class B, int N>
ZO_HD typename B::U zo_join(typename B::U coarse, typename B::U low) {
  const zo_u32 half = 1u << (N - 1);
  return B::add_u(B::template shl<N>(coarse), B::sub_u(B::xor_(low, B::u(half)), B::u(half)));
}

// float32 -> the upper 24 bits, as a number below 2^24
template <class B>
ZO_HD typename B::U zo_bf24_round(typename B::F x) {
  typename B::U u = B::bits(x), odd = B::and_(B::template shr<8>(u), B::u(1));
  return B::select_nan(x, B::u(0x7fc000u), B::template shr<8>(B::add_u(B::add_u(u, B::u(0x7f)), odd)));
}
template <class B>
ZO_HD typename B::U zo_bf24_round_stochastic(typename B::F x, typename B::U r) {
  return B::select_nan(x, B::u(0x7fc000u), B::template shr<8>(B::add_u(B::bits(x), B::template shr<8>(r))));
}

// ---- integers times a float32 scale

#define ZO_LEAST_SCALE 7.888609052210118e-31f  // 2^-100: its inverse is finite, a 256th of it is no subnormal
#define ZO_INT8_LARGEST 127.49609375f          // in scales: 32639 / 256, which still rounds to 127

// The scale of a group at a write-back: `old` while its largest value fits; old = 0 the first time.
ZO_HD float zo_int8_scale(zo_u32 largest_bits, float old) {
  if (largest_bits >= 0x7f800000u) return ZoScalar::value(0x7fc00000u);
  const float largest = ZoScalar::value(largest_bits);
  if (old > 0.0f && largest <= ZoScalar::mul(old, ZO_INT8_LARGEST)) return old;
  const float fresh = ZoScalar::mul(largest, 7.874015718698502e-3f);  // 1 / 127
  return fresh < ZO_LEAST_SCALE ? ZO_LEAST_SCALE : fresh;
}

// 1 / scale; 0 for a NaN scale
ZO_HD float zo_inverse(float scale) { return scale == scale ? ZoScalar::divide(1.0f, scale) : 0.0f; }

// x, at most 2^22 in size, to the nearest integer, as a signed number
template <class B>
ZO_HD typename B::U zo_integer(typename B::F x) {
  return B::sub_u(B::bits(B::add(x, B::f(12582912.0f))), B::u(0x4b400000u));
}

// Signed value of an integer that rounding leaves in the upper bits is lost by the logical shift: callers mask.
template <class B>
ZO_HD typename B::U zo_int8_round(typename B::F scaled) {
  return B::and_(zo_integer<B>(B::clamp(scaled, -127.0f, 127.0f)), B::u(0xff));
}
template <class B>
ZO_HD typename B::U zo_int8_round_stochastic(typename B::F scaled, typename B::U r) {
  typename B::U fine = zo_integer<B>(B::mul(B::clamp(scaled, -127.0f, 127.0f), B::f(4096.0f)));
  return B::and_(B::template shr<12>(B::add_u(fine, B::template shr<4>(r))), B::u(0xff));
}
template <class B>
ZO_HD typename B::F zo_int8_number(typename B::U code) {
  return B::to_float(B::sub_u(B::xor_(code, B::u(0x80)), B::u(0x80)));
}

// the 16-bit master of int8+8, in steps of scale / 256; low 16 bits count
template <class B>
ZO_HD typename B::U zo_int16_round(typename B::F scaled) {
  return B::and_(zo_integer<B>(B::clamp(scaled, -32639.0f, 32639.0f)), B::u(0xffff));
}
template <class B>
ZO_HD typename B::U zo_int16_round_stochastic(typename B::F scaled, typename B::U r) {
  typename B::U fine = zo_integer<B>(B::mul(B::clamp(scaled, -32639.0f, 32639.0f), B::f(64.0f)));
  return B::and_(B::template shr<6>(B::add_u(fine, B::template shr<10>(r))), B::u(0xffff));
}
template <class B>
ZO_HD typename B::F zo_int16_number(typename B::U master) {
  return B::to_float(B::sub_u(B::xor_(B::and_(master, B::u(0xffff)), B::u(0x8000)), B::u(0x8000)));
}

// ---- four bits; never rewritten

struct zo_int4_grid {
  float scale, minimum;
};

// lowest, highest: of a group without NaN or infinity (else largest_bits says so)
ZO_HD zo_int4_grid zo_int4_make_grid(zo_u32 largest_bits, float lowest, float highest) {
  zo_int4_grid grid = {ZoScalar::value(0x7fc00000u), 0.0f};
  if (largest_bits >= 0x7f800000u) return grid;
  // + 0: no negative zero
  grid.minimum = zo_bf16_value<ZoScalar>(zo_bf16_round<ZoScalar>(ZoScalar::add(lowest, 0.0f)));
  const float fresh = ZoScalar::mul(ZoScalar::add(highest, -grid.minimum), 6.666667014360428e-2f);  // 1 / 15
  grid.scale = fresh < ZO_LEAST_SCALE ? ZO_LEAST_SCALE : fresh;
  return grid;
}

// What a code counts from. Centred, a value is fma(code - 7.5, scale, centre).
ZO_HD float zo_int4_middle(bool centred) { return centred ? 7.5f : 0.0f; }

// centre: of a group, as it is kept. Codes are made as if `minimum` were 7.5 scales below it.
ZO_HD float zo_int4_centre(const zo_int4_grid& grid) {
  if (grid.scale != grid.scale) return 0.0f;
  const float middle = ZoScalar::add(ZoScalar::fma(7.5f, grid.scale, grid.minimum), 0.0f);
  return zo_bf16_value<ZoScalar>(zo_bf16_round<ZoScalar>(middle));
}

template <class B>
ZO_HD typename B::U zo_int4_round(typename B::F x, float minimum, float inverse) {
  return zo_integer<B>(B::clamp(zo_scaled<B>(B::add(x, B::f(-minimum)), inverse), 0.0f, 15.0f));
}

ZO_HD float zo_nf4_scale(zo_u32 largest_bits) {
  if (largest_bits >= 0x7f800000u) return ZoScalar::value(0x7fc00000u);
  const float largest = ZoScalar::value(largest_bits);
  return largest < ZO_LEAST_SCALE ? ZO_LEAST_SCALE : largest;
}

// The sixteen values, and the middles between them. A value in the middle goes down.
#define ZO_NF4_VALUES                                                                                               \
  {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,                 \
   -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,                  \
   0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}
#define ZO_NF4_MIDDLES                                                                                              \
  {-0.8480963706970215f, -0.6106328964233398f, -0.4599952697753906f, -0.33967941999435425f, -0.23460739850997925f, \
   -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f, 0.120255246758461f, 0.2035212516784668f, \
   0.2920137643814087f, 0.3893125355243683f, 0.5016634464263916f, 0.6427869200706482f, 0.8614784479141235f}

template <class B>
ZO_HD typename B::U zo_nf4_round(typename B::F x, float inverse) {
  const float middle[15] = ZO_NF4_MIDDLES;
  const typename B::F scaled = zo_scaled<B>(x, inverse);
  typename B::U code = B::u(0);
  ZO_UNROLL
  for (int k = 0; k < 15; ++k) code = B::add_u(code, B::select_greater(scaled, B::f(middle[k]), B::u(1), B::u(0)));
  return inverse == 0.0f ? B::u(0) : code;
}

// ---- a checkpoint's own codes; zo_offload/formats/kept.py
//
// int4f, int8f   fma(code, scale, minimum), codes from 0 up, scale and minimum float32
// fp8f           e4m3 times a float32 scale
// mxfp4          e2m1 times 2^(b - 127), b one byte a group
// nvfp4, fp4     e2m1, or bitsandbytes' table, times a float32 scale
// nvfp4_two      e2m1 times a scale that is itself a product: an e4m3 byte for each 16 elements, and a float32 for each
//                ZO_TWO of them, in the plane of minima; if that is negative, the byte is divided by its magnitude
// mxfp4_across   mxfp4 whose groups lie across the rows of a matrix: a byte for each ZO_BAND elements of one column, that is
//                of ZO_BAND rows next to each other; `across` elements a row, `across` scales for each ZO_BAND rows
// int8_127       int8 times a float32 scale, times 1/127, rounded after each product

#define ZO_E2M1_VALUES \
  {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f}
#define ZO_FP4_VALUES                                                                                                    \
  {0.0f, 0.0052083334885537624f, 0.6666666865348816f, 1.0f, 0.3333333432674408f, 0.5f, 0.1666666716337204f, 0.25f,       \
   0.0f, -0.0052083334885537624f, -0.6666666865348816f, -1.0f, -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f}

// 2^(b - 127), which of b = 0 is no normal float32; NaN for 255
ZO_HD float zo_mx_factor(zo_u32 b) {
  return ZoScalar::value(b == ZO_NAN_EXPONENT ? 0x7fc00000u : b == 0 ? 0x00400000u : b << 23);
}

#define ZO_BAND 32u
#define ZO_TWO 1024u
#define ZO_INVERSE_127 7.874015718698502e-3f

// `zo_mx_factor` of b in each element
template <class B>
ZO_HD typename B::F zo_mx_factors(typename B::U b) {
  const typename B::U large = B::select_less(b, B::u(ZO_NAN_EXPONENT), B::template shl<23>(b), B::u(0x7fc00000u));
  return B::value(B::select_less(b, B::u(1), B::u(0x00400000u), large));
}

// Where the scale of element `at` of mxfp4_across is; at: counted from the first element of a band. Most are below 2^32, where
// division is faster.
ZO_HD zo_u64 zo_across_scale(zo_u64 at, zo_u32 across) {
  const zo_u64 row = at >> 32 ? at / across : (zo_u32)at / across;
  return row / ZO_BAND * across + (at - row * across);
}

// nvfp4_two: number: that of the group's byte
ZO_HD float zo_two_scale(float number, float whole) {
  return whole < 0.0f ? ZoScalar::divide(number, -whole) : ZoScalar::mul(number, whole);
}

// of fp8f: its codes go through fp16, whose exponent bias is 8 more
ZO_HD float zo_fp8f_factor(float scale) { return ZoScalar::mul(scale, 256.0f); }

#endif
