// What a pass asks memory for before it needs it.
//
// A tile is often a page, and a CPU's own prefetchers stop at a page's end. So without this a core computes, and then
// waits for memory, in turns: on Sapphire Rapids a third of the pass over weights that lie in memory. Lines are asked for
// one at a time between the noise's instructions; all at once they fill the few places for lines on their way, and gain
// nothing.
#ifndef ZO_CPU_AHEAD_H
#define ZO_CPU_AHEAD_H
#include "cpu_formats.h"

namespace {

inline int format_of_lane(const zo_lane& l) { return (int)(l.format & ~(zo_u32)ZO_LANE_SUM); }

// The next tile's stored values, and the places of two lanes' outputs in this tile.
struct Ahead {
  enum { LINE = 16 };  // elements for which a line is asked at a time: a cache line of float32

  struct Plane {
    const zo_u8* p;
    zo_u64 step;  // bytes of LINE elements; 0: nothing is wanted, and p is a line that is in the cache
  };
  Plane read, written[2];

  explicit Ahead(const void* here) {
    const Plane nothing = {(const zo_u8*)here, 0};
    read = written[0] = written[1] = nothing;
  }

  bool asks() const { return read.step || written[0].step; }

  // At element i of the tile.
  ZO_HD void operator()(int i) const {
    if (i & (LINE - 1)) return;
    const zo_u64 k = (zo_u32)i / LINE;
    __builtin_prefetch(read.p + k * read.step, 0, 3);
    __builtin_prefetch(written[0].p + k * written[0].step, 1, 3);
    __builtin_prefetch(written[1].p + k * written[1].step, 1, 3);
  }

  // values: of the next tile. Signs whose lanes go past the cache are bound by memory, and slower with it.
  void read_tile(const zo_work* work, const zo_u8* values) {
    if (work->past_cache && work->tag == ZO_TAG_RADEMACHER) return;
    read = {values, (zo_u64)(LINE / 8 * zo_format_bits((int)work->pass->format))};
  }

  // Lanes j and j + 1, where there are such, at the tile that begins at element out_at of them.
  void write_lanes(const zo_work* work, zo_u32 j, zo_u64 out_at) {
    if (work->past_cache) return;
    for (zo_u32 k = 0; k < 2 && j + k < work->pass->num_lanes; ++k) {
      const zo_lane& lane = work->lanes[j + k];
      const zo_u64 size = zo_format_bytes(format_of_lane(lane));
      written[k] = {(const zo_u8*)lane.out + out_at * size, LINE * size};
    }
  }
};

// As `ahead(i)`, but not an element at a time: there the question costs more than the wait.
template <class V>
ZO_HD void ask(const Ahead& ahead, int i) {
  if constexpr (V::WIDTH > 1) ahead(i);
}

// Whether the first lanes' outputs are asked for when their own noise is made, not with the first update's: making floats
// leaves time for that; signs and directions of low rank are there at once.
inline bool writes_later(const zo_work* work) {
  return work->pass->num_updates && work->tag != ZO_TAG_RADEMACHER && !work->pass->rank;
}

}  // namespace

#endif
