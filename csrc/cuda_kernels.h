// The fused pass (fused.h), its gathered-rows form and plain noise as CUDA kernels: one source for nvcc and NVRTC, no
// #include but our own headers.
//
// A warp owns a tile of CHUNKS * 256 consecutive elements, aligned in the element index so that Philox blocks never
// straddle threads; thread L holds elements 256 * c + 8 * L + 0..7 of it, in registers from the first decode to the
// last lane. So a weight is read once and written once, 16 bytes an access (8 for one-byte formats, 4 for 4-bit ones), and nothing
// depends on the launch shape. Head, tail and addresses that are not 16-byte aligned take the same arithmetic with
// element-wide accesses.
//
//   gaussian    a Philox block for a thread's 8 elements, coefficients looked up in shared memory  2 chunks
//   boxmuller   two Philox blocks for a thread's 8 elements: the gaussian of layout 1            2 chunks
//   rademacher  thread L makes word L of the tile's 32 sign words, a shuffle brings it to its users  4 chunks
//
// A launch takes the passes of several parameters that have one format: a block belongs to one of them, and finds it by its
// own index, so all that a warp reads of it is the same for the whole block.
//
// Coefficients, decays and seeds of updates are read from device memory: the host need not know them when it launches.
// A zero coefficient and a decay of one are skipped as fused.h says, so a step that diverged changes nothing.
//
// Checked without a GPU by translating the compiler's PTX to C and comparing bits with the CPU library
// (tests/devices/test_cuda_ptx.py); registers and spills by tests/devices/test_cuda_build.py.
#ifndef ZO_CUDA_KERNELS_H
#define ZO_CUDA_KERNELS_H
#include "cuda_formats.h"

#define ZO_CUDA_PARTS 8     // passes of a launch: the parameters of an owner
#define ZO_CUDA_LANES 32    // of all of them; more take more launches
#define ZO_CUDA_THREADS 256

struct zo_cuda_part {  // one pass of a launch; blocks [first_block, end_block) compute it
  zo_pass pass;        // updates, terms: device memory; lanes: unused
  zo_u64 total_rows;   // of the whole parameter, with rows; others are answered with NaN, by every piece
  zo_i32 last_fold;    // index of the last update that folds, or -1: the host knows which fold
  zo_u32 first_lane;   // of its pass.num_lanes lanes, among those of the launch
  zo_u32 first_block, end_block;
};
struct zo_cuda_args {  // the kernels' only parameter, by value: nothing has to stay alive until the launch runs
  zo_cuda_part parts[ZO_CUDA_PARTS];  // those after the last have end_block 2^32 - 1
  zo_lane lanes[ZO_CUDA_LANES];
};

struct zo_cuda_noise_args {
  float* out;
  zo_u64 numel, offset, seed;
  zo_u32 param_id, rounds;
};

static_assert(sizeof(zo_cuda_part) == sizeof(zo_pass) + 24, "packed by Python");
static_assert(sizeof(zo_cuda_args) == sizeof(zo_cuda_part) * ZO_CUDA_PARTS + 24 * ZO_CUDA_LANES, "packed by Python");
static_assert(sizeof(zo_cuda_noise_args) == 40, "packed by Python");

namespace zo_cuda {

// ---- noise

// Two Philox streams side by side, so that one's latency hides under the other's.
ZO_DEV void philox2(zo_words& a, zo_words& b, zo_u64 seed, zo_u32 rounds) {
  zo_philox_rounds<0, 7>(a.w, seed);
  zo_philox_rounds<0, 7>(b.w, seed);
  if (rounds == 10) {
    zo_philox_rounds<7, 10>(a.w, seed);
    zo_philox_rounds<7, 10>(b.w, seed);
  }
}

ZO_DEV zo_words philox(zo_u64 block, zo_u32 word2, zo_u32 tag, zo_u64 seed, zo_u32 rounds) {
  zo_words a = {{(zo_u32)block, (zo_u32)(block >> 32), word2, tag}};
  zo_philox_rounds<0, 7>(a.w, seed);
  if (rounds == 10) zo_philox_rounds<7, 10>(a.w, seed);
  return a;
}

// The Gaussian's rows, 16 bytes each. A warp looks up 32 of them at once, so they are wanted in shared memory: from
// constant memory it would get them one after the other.
struct alignas(16) Row {
  zo_u32 c[4];
};
#define ZO_CUDA_ROW(A, B, C, D) {{A, B, C, D}},
static __device__ const Row ROWS[16] = {ZO_GAUSSIAN_ROWS(ZO_CUDA_ROW)};

ZO_DEV Row* shared_rows() {
  __shared__ Row rows[16];
  return rows;
}

// z of the half-word in the upper half of s
ZO_DEV float gaussian(zo_u32 s) {
  const float a = zo_gaussian_argument<S>(s);
  const Row row = shared_rows()[S::bits(a) >> 23 & 15u];
  return zo_gaussian<S>(s, a, [&](int k) { return S::value(row.c[k]); });
}

// Every kernel's first move, by all threads of a block.
template <class Noise>
ZO_DEV void prepare() {
  if constexpr (Noise::TABLE) {
    if (threadIdx.x < 16) shared_rows()[threadIdx.x] = ROWS[threadIdx.x];
    __syncthreads();
  }
}

// The z of a thread's elements under one seed. g: the thread's first element in chunk 0, a multiple of 8.
template <int N>
struct GaussianOf {
  enum { CHUNKS = N, TABLE = 1 };
  typedef GaussianOf<1> Part;
  float z[CHUNKS][8];
  ZO_DEV void make(GaussianOf& n, zo_u64 g, zo_u64 seed, zo_u32 param_id, zo_u32 rounds) {
    zo_words b[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const zo_u64 block = (g + 256 * c) >> 3;
      b[c] = zo_words{{(zo_u32)block, (zo_u32)(block >> 32), param_id, ZO_TAG_GAUSSIAN}};
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) zo_philox_rounds<0, 7>(b[c].w, seed);
    if (rounds == 10)
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) zo_philox_rounds<7, 10>(b[c].w, seed);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int j = 0; j < 8; ++j) n.z[c][j] = gaussian(j < 4 ? b[c].w[j ^ 1] << 16 : b[c].w[(j & 3) ^ 1]);
  }
  ZO_DEV void add(const GaussianOf& n, int c, float scale, const float (&w)[8], float (&out)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = zo_add_noise<S>(w[j], scale, n.z[c][j]);
  }
  ZO_DEV float value(const GaussianOf& n, int c, int j) { return n.z[c][j]; }
  // w + scale * z of element i alone
  ZO_DEV float add_one(zo_u64 i, zo_u64 seed, zo_u32 param_id, zo_u32 rounds, float scale, float w) {
    const zo_words b = philox(i >> 3, param_id, ZO_TAG_GAUSSIAN, seed, rounds);
    const zo_u32 low = i & 1 ? b.w[0] : b.w[1], high = i & 1 ? b.w[2] : b.w[3], word = i & 2 ? high : low;
    return zo_add_noise<S>(w, scale, gaussian(i & 4 ? word : word << 16));
  }
};

typedef GaussianOf<2> Gaussian;

template <int N>
struct BoxMullerOf {
  enum { CHUNKS = N, TABLE = 0 };
  typedef BoxMullerOf<1> Part;
  float z[CHUNKS][8];
  ZO_DEV void make(BoxMullerOf& n, zo_u64 g, zo_u64 seed, zo_u32 param_id, zo_u32 rounds) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const zo_u64 block = (g + 256 * c) >> 2, next = block + 1;
      zo_words a = {{(zo_u32)block, (zo_u32)(block >> 32), param_id, ZO_TAG_BOX_MULLER}};
      zo_words b = {{(zo_u32)next, (zo_u32)(next >> 32), param_id, ZO_TAG_BOX_MULLER}};
      philox2(a, b, seed, rounds);
      zo_gaussian_pair<S>(a.w[0], a.w[1], n.z[c][0], n.z[c][1]);
      zo_gaussian_pair<S>(a.w[2], a.w[3], n.z[c][2], n.z[c][3]);
      zo_gaussian_pair<S>(b.w[0], b.w[1], n.z[c][4], n.z[c][5]);
      zo_gaussian_pair<S>(b.w[2], b.w[3], n.z[c][6], n.z[c][7]);
    }
  }
  ZO_DEV void add(const BoxMullerOf& n, int c, float scale, const float (&w)[8], float (&out)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = zo_add_noise<S>(w[j], scale, n.z[c][j]);
  }
  ZO_DEV float value(const BoxMullerOf& n, int c, int j) { return n.z[c][j]; }
  ZO_DEV float add_one(zo_u64 i, zo_u64 seed, zo_u32 param_id, zo_u32 rounds, float scale, float w) {
    const zo_words b = philox(i >> 2, param_id, ZO_TAG_BOX_MULLER, seed, rounds);
    float z0, z1;
    const bool second = i & 2;
    zo_gaussian_pair<S>(second ? b.w[2] : b.w[0], second ? b.w[3] : b.w[1], z0, z1);
    return zo_add_noise<S>(w, scale, i & 1 ? z1 : z0);
  }
};

typedef BoxMullerOf<2> BoxMuller;

template <int N>
struct RademacherOf {
  enum { CHUNKS = N, TABLE = 0 };
  typedef RademacherOf<1> Part;
  zo_u32 signs[CHUNKS];  // 8 bits each
  ZO_DEV zo_u32 pick(const zo_words& b, zo_u32 i) {
    const zo_u32 low = i & 1 ? b.w[1] : b.w[0], high = i & 1 ? b.w[3] : b.w[2];
    return i & 2 ? high : low;
  }
  ZO_DEV void make(RademacherOf& n, zo_u64 g, zo_u64 seed, zo_u32 param_id, zo_u32 rounds) {
    const zo_u32 lane = threadIdx.x & 31;
    if constexpr (CHUNKS == 4) {
      const zo_u64 tile = g - 8 * lane;  // a multiple of 1024: 8 blocks, 32 words
      const zo_u32 word = pick(philox((tile >> 7) + (lane >> 2), param_id, ZO_TAG_RADEMACHER, seed, rounds), lane);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        n.signs[c] = __shfl_sync(0xffffffffu, word, 8 * c + (lane >> 2)) >> (8 * (lane & 3)) & 0xffu;
    } else {
      const zo_words b = philox(g >> 7, param_id, ZO_TAG_RADEMACHER, seed, rounds);
      n.signs[0] = pick(b, (zo_u32)(g >> 5)) >> (zo_u32)(g & 24) & 0xffu;
    }
  }
  ZO_DEV void add(const RademacherOf& n, int c, float scale, const float (&w)[8], float (&out)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = zo_add_sign<S>(w[j], scale, n.signs[c] << (31 - j) & 0x80000000u);
  }
  ZO_DEV float value(const RademacherOf& n, int c, int j) {
    return S::value(0x3f800000u | (n.signs[c] << (31 - j) & 0x80000000u));
  }
  ZO_DEV float add_one(zo_u64 i, zo_u64 seed, zo_u32 param_id, zo_u32 rounds, float scale, float w) {
    const zo_words b = philox(i >> 7, param_id, ZO_TAG_RADEMACHER, seed, rounds);
    return zo_add_sign<S>(w, scale, pick(b, (zo_u32)(i >> 5)) >> (zo_u32)(i & 31) << 31);
  }
};

typedef RademacherOf<4> Rademacher;

// ---- the pass over one tile

// One pass of a launch, as a block has it: references to the kernel's argument, which cost one register.
struct Work {
  const zo_pass& pass;
  const zo_cuda_part& own;
  const zo_lane* lanes;
};

ZO_DEV Work work_of(const zo_cuda_args& args) {
  zo_u32 p = 0;
#pragma unroll
  for (int k = 0; k < ZO_CUDA_PARTS - 1; ++k) p += blockIdx.x >= args.parts[k].end_block ? 1 : 0;
  const zo_cuda_part& own = args.parts[p];
  return Work{own.pass, own, args.lanes + own.first_lane};
}

// A run of consecutive elements [first, last) of the parameter, of which [low, high) are read: with groups, whole ones.
// Element `base` lies at the start of the planes, and g's output `g - first + out_at` after an output's start.
// valid: false for a row that does not exist.
struct Run {
  zo_u64 first, last, low, high, base, out_at;
  bool valid;
};

struct Span {  // which of the 8 elements from g on are in [first, last)
  int lo, hi;
};
template <bool WHOLE>
ZO_DEV Span span_of(zo_u64 first, zo_u64 last, zo_u64 g) {
  if constexpr (WHOLE) return Span{0, 8};
  Span s;
  s.lo = first > g ? (first - g < 8 ? (int)(first - g) : 8) : 0;
  s.hi = last > g ? (last - g < 8 ? (int)(last - g) : 8) : 0;
  return s;
}

template <bool WHOLE>
ZO_DEV Eight eight_of(const Run& run, zo_u64 g) {
  const Span s = span_of<WHOLE>(run.low, run.high, g);
  return Eight{(zo_i64)(g - run.base), s.lo, s.hi};
}

// out = w + scale * z, where the mask has the element; else out stays.
template <class Noise>
ZO_DEV void add_where(const Noise& noise, int c, float scale, const float (&w)[8], zo_u32 mask, float (&out)[8]) {
  if (mask == 0xffu) {  // the usual case, without a choice an element
    Noise::add(noise, c, scale, w, out);
    return;
  }
  float changed[8];
  Noise::add(noise, c, scale, w, changed);
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (mask >> j & 1u) out[j] = changed[j];
}

// A thread's elements that a mask has, a bit each.
ZO_DEV zo_u32 mask_magnitude(const float (&w)[8], zo_u32 limit) {
  zo_u32 bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) bits |= zo_mask_magnitude<S>(w[j], limit) & 1u << j;
  return bits;
}

ZO_DEV zo_u32 mask_random(const zo_pass& pass, zo_u64 g) {
  const zo_words random = philox(g >> 3, pass.param_id, ZO_TAG_MASK, pass.mask_seed, pass.rounds);
  zo_u32 bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) bits |= zo_mask_random<S>(half_word(random, j), pass.mask_limit) & 1u << j;
  return bits;
}

// Of a lane along a sum: its first term in the lower half, how many in the upper.
ZO_DEV zo_u32 first_term(const zo_lane& lane) { return (zo_u32)lane.seed; }
ZO_DEV zo_u32 end_of_terms(const zo_lane& lane) { return (zo_u32)lane.seed + (zo_u32)(lane.seed >> 32); }

ZO_DEV zo_u32 mask_listed(const zo_pass& pass, zo_u64 g) {
  const zo_listed list = zo_listed_at(pass, g / ZO_LISTED);
  zo_u32 bits = 0;
#pragma unroll 1
  for (zo_u32 k = list.from; k < list.to; ++k) {
    const zo_u32 at = list.places[k] - (zo_u32)(g % ZO_LISTED);  // wraps around below g
    if (at < 8) bits |= 1u << at;
  }
  return bits;
}

// z = what a lane is perturbed along, of 8 elements: a sum of noises, or that of its seed alone, which is 0 + 1 * itself
template <class Noise>
ZO_DEV void make_along(const zo_pass& pass, const zo_lane& lane, zo_u64 g, float (&z)[8]) {
  const bool sum = lane.format & ZO_LANE_SUM;
  const zo_update* terms = sum ? pass.terms + (zo_u32)lane.seed : nullptr;
  const zo_u32 count = sum ? (zo_u32)(lane.seed >> 32) : 1;
#pragma unroll
  for (int j = 0; j < 8; ++j) z[j] = 0.0f;
#pragma unroll 1
  for (zo_u32 k = 0; k < count; ++k) {
    const float coeff = sum ? terms[k].coeff : 1.0f;
    if (coeff == 0.0f) continue;
    Noise noise;
    Noise::make(noise, g, sum ? terms[k].seed : lane.seed, pass.param_id, pass.rounds);
    Noise::add(noise, 0, coeff, z, z);
  }
}

// The lanes of 8 elements.
template <class Noise>
ZO_DEV void emit_eight(const Work& args, const Run& run, zo_u64 g, const float (&w)[8], zo_u32 mask) {
  const Span s = span_of<false>(run.first, run.last, g);
  if (s.lo >= s.hi) return;
  float z[8];
  zo_u64 made = 0;
  zo_u32 kind = ~0u;  // of what is made: nothing yet
#pragma unroll 1
  for (zo_u32 j = 0; j < args.pass.num_lanes; ++j) {
    const zo_lane& lane = args.lanes[j];
    const float scale = lane.scale;
    if (scale != 0.0f && !(made == lane.seed && kind == (lane.format & ZO_LANE_SUM))) {
      make_along<Noise>(args.pass, lane, g, z);
      made = lane.seed;
      kind = lane.format & ZO_LANE_SUM;
    }
    float out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = scale != 0.0f && mask >> i & 1u ? zo_add_noise<S>(w[i], scale, z[i]) : w[i];
    write_lane<false>(lane, g - run.first + run.out_at, s.lo, s.hi, out);
  }
}

// WHOLE: the tile lies inside the run and everything is aligned, and no lane is along a sum; the hot loop has nothing else
// in it. A sum would take registers from it, and what its noises cost is far above what wide accesses save.
template <int FORMAT, class Noise, bool WHOLE>
ZO_DEV void tile_of(const Work& args, const Run& run, zo_u64 start) {
  enum { CHUNKS = Noise::CHUNKS };
  const zo_pass& pass = args.pass;
  const zo_u64 g = start + 8 * (threadIdx.x & 31);
  const bool master = residual_size(FORMAT) != 0 && (args.own.last_fold >= 0 || (pass.flags & ZO_MASTER));
  float w[CHUNKS][8];
  Group group[CHUNKS];
  zo_u32 mask[CHUNKS];
  Noise noise;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
    mask[c] = pass.mask == ZO_MASK_RANDOM   ? mask_random(pass, g + 256 * c)
              : pass.mask == ZO_MASK_LISTED ? mask_listed(pass, g + 256 * c)
                                            : 0xffu;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const Eight e = eight_of<WHOLE>(run, g + 256 * c);
    if constexpr (!WHOLE)
#pragma unroll
      for (int j = 0; j < 8; ++j) w[c][j] = S::value(0x7fc00000u);
    group[c] = Group{0.0f, 0.0f, 0};
    if (WHOLE || (run.valid && e.lo < e.hi)) {
      group[c] = load_group<FORMAT>(pass, e);
      load<WHOLE, FORMAT>(pass, e, group[c], master, w[c]);
    }
  }
#pragma unroll 1
  for (zo_u32 k = 0; k < pass.num_updates; ++k) {
    const zo_update& u = pass.updates[k];
    const float coeff = u.coeff, decay = u.decay;
    const zo_u64 seed = u.seed;
    if (pass.mask == ZO_MASK_MAGNITUDE && !(k && u.flags & ZO_UPDATE_SAME_STEP))
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) mask[c] = mask_magnitude(w[c], pass.mask_limit);
    if (decay != 1.0f)
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (mask[c] >> j & 1u) w[c][j] = S::mul(w[c][j], decay);
    if (coeff != 0.0f) {
      Noise::make(noise, g, seed, pass.param_id, pass.rounds);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) add_where<Noise>(noise, c, -coeff, w[c], mask[c], w[c]);
    }
    if (!(u.flags & ZO_UPDATE_FOLD)) continue;
    const bool last = (zo_i32)k == args.own.last_fold, keep = (pass.flags & ZO_WRITE_BACK) && last && run.valid;
    const bool stochastic = (pass.flags & ZO_STOCHASTIC) && FORMAT != ZO_FP32 && FORMAT != ZO_BF16_16;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const Eight e = eight_of<WHOLE>(run, g + 256 * c);
      zo_words random = {{0, 0, 0, 0}};
      if (stochastic) random = philox((g + 256 * c) >> 3, pass.param_id, ZO_TAG_ROUNDING, seed, pass.rounds);
      fold<WHOLE, FORMAT>(pass, e, group[c], w[c], stochastic, random, last, keep && e.lo < e.hi);
    }
  }
  if (pass.mask == ZO_MASK_MAGNITUDE)
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) mask[c] = mask_magnitude(w[c], pass.mask_limit);
  if constexpr (!WHOLE) {
    emit_eight<Noise>(args, run, g, w[0], mask[0]);
    return;
  }
  zo_u64 made = 0;
  bool have = false;
#pragma unroll 1
  for (zo_u32 j = 0; j < args.pass.num_lanes; ++j) {
    const zo_lane& lane = args.lanes[j];
    const float scale = lane.scale;
    if (scale != 0.0f && !(have && made == lane.seed)) {
      Noise::make(noise, g, lane.seed, pass.param_id, pass.rounds);
      made = lane.seed;
      have = true;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const Span s = span_of<WHOLE>(run.first, run.last, g + 256 * c);
      if (s.lo >= s.hi) continue;
      float out[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = w[c][i];
      if (scale != 0.0f) add_where<Noise>(noise, c, scale, w[c], mask[c], out);
      write_lane<WHOLE>(lane, g + 256 * c - run.first + run.out_at, s.lo, s.hi, out);
    }
  }
}

// Element 8 * i of the parameter is aligned for vectors in everything that this run touches.
template <int FORMAT>
ZO_DEV bool aligned(const Work& args, const Run& run) {
  const int bits = is_four(FORMAT) ? 4 : 8 * value_size(FORMAT);
  zo_u64 low = (zo_u64)args.pass.stored - run.base * bits / 8;
  if (residual_size(FORMAT)) low |= (zo_u64)args.pass.residual - run.base * residual_size(FORMAT);
  for (zo_u32 j = 0; j < args.pass.num_lanes; ++j)
    low |= (zo_u64)args.lanes[j].out + (run.out_at - run.first) * (format_of(args.lanes[j]) == ZO_FP32 ? 4 : 2);
  return (low & 15) == 0 && run.valid && (run.base & 7) == 0;
}

template <int FORMAT, class Noise>
ZO_DEV void tile(const Work& args, const Run& run, zo_u64 start, bool aligned) {
  if (aligned && args.pass.num_terms == 0 && start >= run.first && start + 256 * Noise::CHUNKS <= run.last)
    tile_of<FORMAT, Noise, true>(args, run, start);
  else
#pragma unroll 1
    for (int c = 0; c < Noise::CHUNKS; ++c) tile_of<FORMAT, typename Noise::Part, false>(args, run, start + 256 * c);
}

ZO_DEV zo_u64 tiles_of(zo_u64 first, zo_u64 last, zo_u64 size) { return (last + size - 1) / size - first / size; }

// A run's elements to read: whole groups, to the parameter's end.
ZO_DEV Run run_of(const zo_pass& pass, zo_u64 first, zo_u64 out_at, bool valid) {
  const zo_u64 base = pass.offset, end = base + pass.total;
  Run run = {first, first + pass.numel, first, first + pass.numel, base, out_at, valid};
  if (pass.group) {
    const zo_u64 inside = pass.group - 1;
    run.low = first & ~inside;
    run.high = (run.last + inside) & ~inside;
    if (run.high > end) run.high = end;
  }
  return run;
}

// All warps of the part walk over its tiles, fewer than 2^31 as the host has checked; every condition here is the same for
// a whole warp. One call of `tile`: it is inlined, and most of the code there is.
template <class Tile>
ZO_DEV void walk(const Work& args, const zo_u64 TILE, Tile tile) {
  const zo_pass& pass = args.pass;
  const zo_u32 a_row = (zo_u32)(pass.numel / TILE) + 2;  // tiles a row touches, at most
  const zo_u32 warp = (blockIdx.x - args.own.first_block) * (ZO_CUDA_THREADS / 32) + threadIdx.x / 32;
  for (zo_u32 t = warp;; t += (args.own.end_block - args.own.first_block) * (ZO_CUDA_THREADS / 32)) {
    zo_u64 first = pass.offset, out_at = 0;
    zo_u32 nth = t;
    bool valid = true;
    if (pass.rows) {
      const zo_u32 u = t / a_row;
      if (u >= pass.num_rows) return;
      const zo_i64 row = pass.rows[u];
      valid = row >= 0 && (zo_u64)row < args.own.total_rows;
      if (valid) first = (zo_u64)row * pass.numel;
      if (first - pass.offset >= pass.total) continue;  // a row of another piece (or, wrapped around, of one before)
      out_at = (zo_u64)u * pass.numel;
      nth = t - u * a_row;
    }
    const Run run = run_of(pass, first, out_at, valid);
    const zo_u64 start = (first / TILE + nth) * TILE;
    if (start < run.last)
      tile(run, start);
    else if (!pass.rows)
      return;
  }
}

template <int FORMAT, class Noise>
ZO_DEV void pass_kernel(const zo_cuda_args& all) {
  prepare<Noise>();
  const Work args = work_of(all);
  walk(args, 256 * Noise::CHUNKS, [&](const Run& run, zo_u64 start) {
    tile<FORMAT, Noise>(args, run, start, aligned<FORMAT>(args, run));
  });
}

// ---- scales as what trains

// 256 elements: a thread's 8 lie in one group, whose scale it moves by itself.
template <int FORMAT, class Noise>
ZO_DEV void scales_tile(const Work& args, const Run& run, zo_u64 start) {
  const zo_pass& pass = args.pass;
  const zo_u64 g = start + 8 * (threadIdx.x & 31);
  const Eight e = eight_of<false>(run, g);
  const Span s = span_of<false>(run.first, run.last, g);
  float number[8];
  Group group = {S::value(0x7fc00000u), 0.0f, 0};
#pragma unroll
  for (int j = 0; j < 8; ++j) number[j] = 0.0f;
  if (run.valid && e.lo < e.hi) {
    group = load_group<FORMAT>(pass, e);
    load_numbers<false, FORMAT>(pass, e, number);
  }
  __syncwarp();  // one thread of the group writes the scale below: all of them have read it now
  if (e.lo >= e.hi) return;
  const zo_u64 index = group_of(pass, g);  // of the group in its parameter, and so of its noise
  float scale = group.scale;
#pragma unroll 1
  for (zo_u32 k = 0; k < pass.num_updates; ++k) {
    const zo_update& u = pass.updates[k];
    if (u.decay != 1.0f) scale = S::mul(scale, u.decay);
    if (u.coeff != 0.0f) scale = Noise::add_one(index, u.seed, pass.param_id, pass.rounds, -u.coeff, scale);
    scale = zo_trained_scale(scale);
    if ((pass.flags & ZO_WRITE_BACK) && (zo_i32)k == args.own.last_fold && run.valid && (e.at & (pass.group - 1)) == 0)
      ((float*)pass.scales)[group_of(pass, e.at)] = scale;
  }
#pragma unroll 1
  for (zo_u32 j = 0; j < args.pass.num_lanes; ++j) {
    const zo_lane& lane = args.lanes[j];
    const float by = lane.scale;
    float moved = scale;
    if (by != 0.0f && lane.format & ZO_LANE_SUM) {
      float sum = 0.0f;
#pragma unroll 1
      for (zo_u32 k = first_term(lane); k < end_of_terms(lane); ++k) {
        const zo_update& term = pass.terms[k];
        if (term.coeff != 0.0f) sum = Noise::add_one(index, term.seed, pass.param_id, pass.rounds, term.coeff, sum);
      }
      moved = zo_add_noise<S>(scale, by, sum);
    } else if (by != 0.0f) {
      moved = Noise::add_one(index, lane.seed, pass.param_id, pass.rounds, by, scale);
    }
    group.scale = S::value(zo_fp32_round<S>(moved));
    if (s.lo >= s.hi) continue;
    float out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = value_of<FORMAT>(number[i], group);
    write_lane<false>(lane, g - run.first + run.out_at, s.lo, s.hi, out);
  }
}

template <int FORMAT, class Noise>
ZO_DEV void scales_kernel(const zo_cuda_args& all) {
  prepare<Noise>();
  const Work args = work_of(all);
  const zo_u64 TILE = 256 * Noise::CHUNKS;
  walk(args, TILE, [&](const Run& run, zo_u64 start) {
#pragma unroll 1
    for (int c = 0; c < Noise::CHUNKS; ++c) scales_tile<FORMAT, Noise>(args, run, start + 256 * c);
  });
}

// Formats whose passes with signs as noise need so few registers that three blocks fit; older GPUs' compilers would spill.
constexpr bool is_light(int format) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return format == ZO_FP32 || format == ZO_BF16 || format == ZO_INT4;
#else
  return format < 0;
#endif
}

template <class Noise>
ZO_DEV void noise_kernel(const zo_cuda_noise_args& args) {
  prepare<Noise>();
  const zo_u64 TILE = 256 * Noise::CHUNKS, last = args.offset + args.numel;
  const zo_u64 tiles = tiles_of(args.offset, last, TILE), base = args.offset / TILE;
  const zo_u64 warps = (zo_u64)gridDim.x * (ZO_CUDA_THREADS / 32);
  const zo_u64 warp = (zo_u64)blockIdx.x * (ZO_CUDA_THREADS / 32) + threadIdx.x / 32;
  for (zo_u64 t = warp; t < tiles; t += warps) {
    const zo_u64 g = (base + t) * TILE + 8 * (threadIdx.x & 31);
    Noise noise;
    Noise::make(noise, g, args.seed, args.param_id, args.rounds);
#pragma unroll
    for (int c = 0; c < Noise::CHUNKS; ++c) {
      const Span s = span_of<false>(args.offset, last, g + 256 * c);
      if (s.lo >= s.hi) continue;
      float z[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) z[j] = Noise::value(noise, c, j);
      write_fp32<false>((zo_u8*)args.out + (zo_i64)(g + 256 * c - args.offset) * 4, s.lo, s.hi, z);
    }
  }
}

}  // namespace zo_cuda

// BLOCKS: of a multiprocessor, at least; the compiler has registers for as many.
#define ZO_KERNEL_OF(BLOCKS) extern "C" __global__ void __launch_bounds__(ZO_CUDA_THREADS, BLOCKS)
#define ZO_KERNEL ZO_KERNEL_OF(2)
#define ZO_PASS_KERNELS(NAME, FORMAT)                                                     \
  ZO_KERNEL zo_pass_##NAME##_gaussian(const zo_cuda_args args) {                          \
    zo_cuda::pass_kernel<FORMAT, zo_cuda::Gaussian>(args);                                \
  }                                                                                       \
  ZO_KERNEL zo_pass_##NAME##_boxmuller(const zo_cuda_args args) {                         \
    zo_cuda::pass_kernel<FORMAT, zo_cuda::BoxMuller>(args);                               \
  }                                                                                       \
  ZO_KERNEL_OF(zo_cuda::is_light(FORMAT) ? 3 : 2) zo_pass_##NAME##_rademacher(const zo_cuda_args args) {                        \
    zo_cuda::pass_kernel<FORMAT, zo_cuda::Rademacher>(args);                              \
  }
#define ZO_SCALES_KERNELS(NAME, FORMAT)                                                   \
  ZO_KERNEL zo_scales_##NAME##_gaussian(const zo_cuda_args args) {                        \
    zo_cuda::scales_kernel<FORMAT, zo_cuda::Gaussian>(args);                              \
  }                                                                                       \
  ZO_KERNEL zo_scales_##NAME##_boxmuller(const zo_cuda_args args) {                       \
    zo_cuda::scales_kernel<FORMAT, zo_cuda::BoxMuller>(args);                             \
  }                                                                                       \
  ZO_KERNEL zo_scales_##NAME##_rademacher(const zo_cuda_args args) {                      \
    zo_cuda::scales_kernel<FORMAT, zo_cuda::Rademacher>(args);                            \
  }

#define ZO_SCALES_KERNELS_0(NAME, FORMAT)
#define ZO_SCALES_KERNELS_1(NAME, FORMAT) ZO_SCALES_KERNELS(NAME, FORMAT)
#define ZO_FORMAT_KERNELS(NAME, CODE, NUMBER, BITS, SCALE, MINIMUM, RESIDUAL, TRAINS, SCALES) \
  ZO_PASS_KERNELS(NAME, ZO_##CODE)                                                            \
  ZO_SCALES_KERNELS_##SCALES(NAME, ZO_##CODE)
#ifdef ZO_ONE_FORMAT  // and ZO_WANT_<name> as 1: that format's kernels alone; somebody waits for the compiler
#define ZO_PROBE_1 ~, 1
#define ZO_SECOND(A, B, ...) B
#define ZO_SECOND_OF(...) ZO_SECOND(__VA_ARGS__, 0, 0)
#define ZO_KERNELS_IF_0(...)
#define ZO_KERNELS_IF_1(...) ZO_FORMAT_KERNELS(__VA_ARGS__)
#define ZO_PASTE_(A, B) A##B
#define ZO_PASTE(A, B) ZO_PASTE_(A, B)
#define ZO_WANTED_KERNELS(NAME, ...) \
  ZO_PASTE(ZO_KERNELS_IF_, ZO_SECOND_OF(ZO_PASTE(ZO_PROBE_, ZO_WANT_##NAME)))(NAME, __VA_ARGS__)
ZO_FORMATS(ZO_WANTED_KERNELS)
#else
ZO_FORMATS(ZO_FORMAT_KERNELS)
#endif

// Asked by Python before any other launch: an image made from other sources would be handed other structs. A kernel and
// not a variable, whose symbol is local to the image.
ZO_KERNEL zo_cuda_abi(const zo_cuda_noise_args args) {
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *(zo_u32*)args.out = ZO_ABI_VERSION << 16 | ZO_LAYOUT_VERSION << 12 | (zo_u32)sizeof(zo_cuda_args);
}

ZO_KERNEL zo_noise_gaussian(const zo_cuda_noise_args args) { zo_cuda::noise_kernel<zo_cuda::Gaussian>(args); }
ZO_KERNEL zo_noise_boxmuller(const zo_cuda_noise_args args) { zo_cuda::noise_kernel<zo_cuda::BoxMuller>(args); }
ZO_KERNEL zo_noise_rademacher(const zo_cuda_noise_args args) { zo_cuda::noise_kernel<zo_cuda::Rademacher>(args); }

// out[h] = z of half-word h, for all numel = 65,536 of them
ZO_KERNEL zo_gaussian_table(const zo_cuda_noise_args args) {
  zo_cuda::prepare<zo_cuda::Gaussian>();
  for (zo_u32 h = blockIdx.x * ZO_CUDA_THREADS + threadIdx.x; h < args.numel; h += gridDim.x * ZO_CUDA_THREADS)
    args.out[h] = zo_cuda::gaussian(h << 16);
}

#endif
