// Storage formats, bits <-> float32, as templates over an arithmetic backend (noise.h). No #include but noise.h.
//
// Encoding rounds to nearest even, or stochastically against 16 random bits r in [0, 65536): the value goes up with a
// chance equal to the part that is dropped. Defined on integers, so subnormals come out right whatever the rounding
// and flush modes. Infinities stay; every NaN becomes the one quiet NaN of the format, because a NaN's payload is the
// one thing devices disagree on.
//
// To come, in the same place: fp8, int8, int4, nf4 (scales through zo_pass.aux and zo_pass.group).
#ifndef ZO_FORMATS_H
#define ZO_FORMATS_H
#include "noise.h"

enum { ZO_FP32 = 0, ZO_BF16 = 1, ZO_FP16 = 2, ZO_NUM_FORMATS = 3 };

ZO_HD int zo_format_bytes(int format) { return format == ZO_FP32 ? 4 : 2; }

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

#endif
