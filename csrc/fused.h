// The fused pass for one element; what every tile, warp and vector of it must equal. No #include but ours.
//
//   w = decode(stored)                               join(stored, residual) if split and any update folds
//   for each update:  mask = mask of w                   if it is by magnitude and the update is its step's first
//                     w = w * decay                  unless decay == 1
//                     w = fma(-coeff, z, w)          unless coeff == 0; both where the mask has the element
//                     w = decode(encode(w))          if it folds; of a split format, the master's value
//   stored = the bytes of the last fold              if write-back is on and any update folds
//   w = decode(stored)                               after the last fold, if split: lanes see the coarse plane
//   mask = mask of w                                   if it is by magnitude
//   for each lane:    out = round(fma(scale, z, w))  round(w) if scale == 0 or the mask has not the element
//
// A lane's z is the noise of its seed, or a sum of noises: from d = 0, for each of the sum's terms in their order,
// d = fma(coeff, z, d), unless coeff == 0.
//
// With scales as the target, w is a group's scale and z's index the group's; after each update it is at least 1e-7,
// folding rounds nothing, and an output is the element's code times its group's moved scale (plus the minimum; with
// ZO_CENTRED, the code less 7.5 times the moved scale, plus the centre).
//
// Skipping where a factor is 1 or 0 is part of the definition: it keeps the sign of a zero weight.
#ifndef ZO_FUSED_H
#define ZO_FUSED_H
#include "api.h"

template <class B>
ZO_HD typename B::F zo_add_noise(typename B::F w, typename B::F scale, typename B::F z) {
  return B::fma(scale, z, w);
}

// z = +-1 given as a sign bit (0 or 0x80000000): fma(scale, +-1, w) is one exact product and one rounded sum
template <class B>
ZO_HD typename B::F zo_add_sign(typename B::F w, typename B::F scale, typename B::U sign) {
  return B::add(w, B::value(B::xor_(B::bits(scale), sign)));
}

// a trained scale stays positive (QZO: Shang et al. 2025, "Fine-tuning quantized neural networks with zeroth-order
// optimization"); a NaN becomes the one quiet NaN
ZO_HD float zo_trained_scale(float scale) {
  return scale == scale ? (scale < 1e-7f ? 1e-7f : scale) : ZoScalar::value(0x7fc00000u);
}

// Masks as words, all ones or 0: a difference whose sign says which is less. NaNs are above every limit.
template <class B>
ZO_HD typename B::U zo_mask_magnitude(typename B::F w, zo_u32 limit) {
  const typename B::U magnitude = B::and_(B::bits(w), B::u(0x7fffffffu));
  return B::sub_u(B::template shr<31>(B::sub_u(B::u(limit), magnitude)), B::u(1));
}

template <class B>
ZO_HD typename B::U zo_mask_random(typename B::U half_word, zo_u32 limit) {
  return B::sub_u(B::u(0), B::template shr<31>(B::sub_u(half_word, B::u(limit))));
}

template <class B>
ZO_HD typename B::F zo_where(typename B::U mask, typename B::F a, typename B::F b) {
  return B::value(B::xor_(B::bits(b), B::and_(mask, B::xor_(B::bits(a), B::bits(b)))));
}

// What a list says of ZO_LISTED elements: places [from, to) of `places`.
struct zo_listed {
  const zo_u16* places;
  zo_u32 from, to;
};
ZO_HD zo_listed zo_listed_at(const zo_pass& pass, zo_u64 tile) {
  const zo_u32* starts = (const zo_u32*)pass.mask_seed;
  if (tile >= pass.mask_limit) return zo_listed{nullptr, 0, 0};
  return zo_listed{(const zo_u16*)(starts + pass.mask_limit + 1), starts[tile], starts[tile + 1]};
}

// index of the last update that folds, or -1
ZO_HD int zo_last_fold(const zo_update* updates, zo_u32 count) {
  int last = -1;
  for (zo_u32 i = 0; i < count; ++i)
    if (updates[i].flags & ZO_UPDATE_FOLD) last = (int)i;
  return last;
}

#endif
