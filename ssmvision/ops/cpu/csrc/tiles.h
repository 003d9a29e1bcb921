// Moving chunks of tokens between tensors of any layout and tiles in L1, along a route.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "simd.h"

namespace ssmvision {
namespace {

// The tokens of one chunk of one route.
struct Steps {
  int64_t token[CHUNK];
  int count;
  bool raster;          // consecutive tokens: allows block transposes of channels-first tensors
  bool reset[CHUNK];

  // `row` lists the tokens of a route of `steps` steps (null: 0, 1, 2, ...), `flags` marks resets by token (null: none).
  Steps(const int64_t* row, int64_t steps, int64_t chunk, const uint8_t* flags) : raster(row == nullptr) {
    const int64_t begin = chunk * CHUNK;
    count = int(std::min<int64_t>(CHUNK, steps - begin));
    for (int t = 0; t < count; ++t) token[t] = raster ? begin + t : row[begin + t];
    for (int t = 0; t < count; ++t) reset[t] = flags && flags[token[t]];
  }
};

// load_tile for one vector of channels.
inline void load_lanes(vf* tile, const float* p, int64_t stride_c, int64_t stride_l, const Steps& s, int width) {
  if (stride_c == 1 && width == LANES) {
    for (int t = 0; t < s.count; ++t) tile[t] = load(p + s.token[t] * stride_l);
    return;
  }
  int t = 0;
  if (stride_l == 1 && s.raster && width == LANES) {
    for (; t + LANES <= s.count; t += LANES) {
      for (int i = 0; i < LANES; ++i) tile[t + i] = load(p + i * stride_c + s.token[t]);
      transpose(tile + t);
    }
  }
  for (; t < s.count; ++t) {
    tile[t] = vf{};
    for (int i = 0; i < width; ++i) tile[t][i] = p[i * stride_c + s.token[t] * stride_l];
  }
}

inline void store_lanes(const vf* tile, float* p, int64_t stride_c, int64_t stride_l, const Steps& s, int width, bool add) {
  if (stride_c == 1 && width == LANES) {
    for (int t = 0; t < s.count; ++t) {
      float* q = p + s.token[t] * stride_l;
      store(q, add ? load(q) + tile[t] : tile[t]);
    }
    return;
  }
  int t = 0;
  if (stride_l == 1 && s.raster && width == LANES) {
    for (; t + LANES <= s.count; t += LANES) {
      vf block[LANES];
      for (int i = 0; i < LANES; ++i) block[i] = tile[t + i];
      transpose(block);
      for (int i = 0; i < LANES; ++i) {
        float* q = p + i * stride_c + s.token[t];
        store(q, add ? load(q) + block[i] : block[i]);
      }
    }
  }
  for (; t < s.count; ++t)
    for (int i = 0; i < width; ++i) {
      float& q = p[i * stride_c + s.token[t] * stride_l];
      q = add ? q + tile[t][i] : tile[t][i];
    }
}

// Steps that go through long chains of arithmetic in lockstep, and the room that a whole number of such blocks takes: what
// stands past the last step of a chunk may be computed with, and is not used.
constexpr int LOCKSTEP = 5, ROOM = (CHUNK + LOCKSTEP - 1) / LOCKSTEP * LOCKSTEP;

// Asks for the lines of a tile well before they are needed: rows lie too far apart for the hardware to guess.
template <bool WRITTEN>
[[gnu::always_inline]] inline void prefetch_tile(const float* p, int64_t stride_c, int64_t stride_l, const Steps& s) {
  if (stride_c != 1) return;
  for (int t = 0; t < s.count; ++t) {
    const float* q = p + s.token[t] * stride_l;
    __builtin_prefetch(q, WRITTEN, 2);
    __builtin_prefetch(q + LANES, WRITTEN, 2);
  }
}

// A tile holds `width` channels of a chunk's tokens, in vectors: tile[v * ROOM + t] = channels v * LANES ... of token t;
// lanes past `width` are zero. Two vectors of adjacent channels go together, as they share a cache line.
inline void load_tile(vf* tile, const float* p, int64_t stride_c, int64_t stride_l, const Steps& s, int width) {
  if (stride_c == 1 && width == 2 * LANES) {
    for (int t = 0; t < s.count; ++t) {
      const float* q = p + s.token[t] * stride_l;
      __builtin_prefetch(q + 2 * LANES, 0, 2);
      __builtin_prefetch(q + 3 * LANES, 0, 2);
      tile[t] = load(q);
      tile[ROOM + t] = load(q + LANES);
    }
    return;
  }
  for (int c = 0; c < width; c += LANES, tile += ROOM)
    load_lanes(tile, p + c * stride_c, stride_c, stride_l, s, std::min(LANES, width - c));
}

inline void store_tile(const vf* tile, float* p, int64_t stride_c, int64_t stride_l, const Steps& s, int width, bool add) {
  if (stride_c == 1 && width == 2 * LANES) {
    for (int t = 0; t < s.count; ++t) {
      float* q = p + s.token[t] * stride_l;
      store(q, add ? load(q) + tile[t] : tile[t]);
      store(q + LANES, add ? load(q + LANES) + tile[ROOM + t] : tile[ROOM + t]);
    }
    return;
  }
  for (int c = 0; c < width; c += LANES, tile += ROOM)
    store_lanes(tile, p + c * stride_c, stride_c, stride_l, s, std::min(LANES, width - c), add);
}

// One token's channels, at any distance from each other.
inline vf load_row(const float* p, int64_t stride_c, int width) {
  vf v{};
  if (stride_c == 1 && width == LANES) return load(p);
  for (int i = 0; i < width; ++i) v[i] = p[i * stride_c];
  return v;
}

inline vf load_part(const float* p, int width) {
  if (width == LANES) return load(p);
  vf v{};
  for (int i = 0; i < width; ++i) v[i] = p[i];
  return v;
}

inline void store_part(float* p, vf v, int width) {
  if (width == LANES) return store(p, v);
  for (int i = 0; i < width; ++i) p[i] = v[i];
}

}  // namespace
}  // namespace ssmvision
