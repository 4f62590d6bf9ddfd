// Block programs of quantize_coords and dequantize_coords: what one CUDA block does with its tile of joints.
//
// Both ops only move memory (429 bytes a sample of 13 joints), but change its order: (joint, axis) on one side, (axis,
// joint) on the other. A tile is staged in shared memory in the order of the tokens, so that both sides are read and
// written in whole lines: coordinates 8 bytes a thread, tokens 16.
#pragma once

#include "common/block.h"
#include "quantize_coords/quantize_coords.h"

namespace m4k {

// Joints of a tile: with 256 threads four loads a thread wait together. Registers (40 a thread on sm_90 for float32,
// nvcc 13.0) let six blocks share a multiprocessor, which then has 55 KB of coordinates under way; 4.8 TB/s for 0.8 us
// over the 132 of an H200 asks for 29 KB. Shared memory (12 KB a block) would allow eight even of the 100 KB of sm_120.
inline constexpr int kTileJoints = 1024;
inline constexpr int kTileThreads = 256;

// How the joints are cut up: tiles of whole samples, or where a sample is longer than a tile, of a part of one.
struct Tiling {
    int64_t tiles;
    int64_t parts;     // tiles of a sample; 1 where a tile has whole samples
    int32_t samples;   // of a tile
    int32_t joints;    // of each of them
    uint64_t inverse;  // 2^32 / joints rounded up: i / joints = i * inverse >> 32 for i * joints < 2^32
    bool pairs;        // whether every tile's tokens begin at an even index, so at 16 bytes
};

inline Tiling make_tiling(int64_t n, int64_t joints) {
    Tiling t{};
    if (n == 0 || joints == 0) return t;
    t.samples = static_cast<int32_t>(joints < kTileJoints ? kTileJoints / joints : 1);
    if (t.samples > 1) t.samples &= ~1;
    t.joints = static_cast<int32_t>(joints < kTileJoints ? joints : kTileJoints);
    t.parts = (joints + t.joints - 1) / t.joints;
    t.tiles = t.parts > 1 ? n * t.parts : (n + t.samples - 1) / t.samples;
    t.inverse = ((uint64_t{1} << 32) + static_cast<uint64_t>(t.joints) - 1) / static_cast<uint64_t>(t.joints);
    t.pairs = t.parts == 1 && t.samples * t.joints % 2 == 0;
    return t;
}

// Where a tile lies: joints `first` to first + samples * joints of all, tokens from `tokens` on.
struct Tile {
    int64_t sample;
    int64_t first;
    int64_t tokens;
    int32_t joints;  // of each sample
    int32_t count;   // joints in all

    M4K_BLOCK Tile(const Tiling& t, int64_t index, int64_t n, int64_t all_joints) {
        sample = t.parts > 1 ? index / t.parts : index * t.samples;
        const int64_t part = t.parts > 1 ? (index % t.parts) * t.joints : 0;
        const int64_t samples = n - sample < t.samples ? n - sample : t.samples;
        joints = static_cast<int32_t>(all_joints - part < t.joints ? all_joints - part : t.joints);
        count = static_cast<int32_t>(samples) * joints;
        first = sample * all_joints + part;
        tokens = sample * 3 * all_joints + part;
    }
};

M4K_BLOCK int divide_by_joints(const Tiling& t, int i) {
    return static_cast<int>((static_cast<uint64_t>(i) * t.inverse) >> 32);
}

// The sample of the tile's joint q, and where the joint's x token is staged; its y and visibility follow joints apart.
struct StagedJoint {
    int32_t sample;
    int32_t at;

    M4K_BLOCK StagedJoint(const Tiling& t, const Tile& tile, int q) {
        sample = divide_by_joints(t, q);
        at = q + 2 * sample * tile.joints;
    }
};

// Index of the tile's staged token e among all tokens.
M4K_BLOCK int64_t token_index(const Tiling& t, const Tile& tile, int64_t all_joints, int e) {
    if (t.parts == 1) return tile.tokens + e;
    const int plane = e / tile.joints;
    return tile.tokens + plane * all_joints + (e - plane * tile.joints);
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
    T x, y;
};

template <typename T>
M4K_BLOCK Pair<T> load_pair(const T* p) {
#if defined(__CUDA_ARCH__)
    return *reinterpret_cast<const Pair<T>*>(p);
#else
    return {p[0], p[1]};
#endif
}

// A store of two words that nobody reads soon. nvcc 13.0 splits an assignment of two 8-byte words in two; not this.
template <typename T>
M4K_BLOCK void store_pair(T* p, Pair<T> pair) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 8) {
        __stcs(reinterpret_cast<longlong2*>(p), make_longlong2(pair.x, pair.y));
    } else {
        __stcs(reinterpret_cast<float2*>(p), make_float2(pair.x, pair.y));
    }
#else
    p[0] = pair.x;
    p[1] = pair.y;
#endif
}

// staged: 3 * kTileJoints words.
template <typename Ctx, typename T>
M4K_BLOCK void quantize_block(Ctx& ctx, const QuantizeArgs<T>& a, const Tiling& tiling, int32_t* staged) {
    const Tile tile(tiling, ctx.block(), a.n, a.joints);
    ctx.for_each_thread([&](int t) {
        constexpr int kPerThread = kTileJoints / kTileThreads;
        Pair<T> xy[kPerThread];
        uint8_t visible[kPerThread];
        for (int base = 0; base < tile.count; base += kPerThread * ctx.threads()) {
            M4K_UNROLL
            for (int k = 0; k < kPerThread; ++k) {  // all loads first, so that they wait together
                const int q = base + k * ctx.threads() + t;
                if (q >= tile.count) continue;
                xy[k] = load_pair(a.xy + 2 * (tile.first + q));
                visible[k] = a.visible[tile.first + q];
            }
            M4K_UNROLL
            for (int k = 0; k < kPerThread; ++k) {
                const int q = base + k * ctx.threads() + t;
                if (q >= tile.count) continue;
                const StagedJoint joint(tiling, tile, q);
                Pair<T> scale{T(1), T(1)}, offset{T(0), T(0)};
                if (a.scale) scale = load_pair(a.scale + (tile.sample + joint.sample) * a.scale_step);
                if (a.offset) offset = load_pair(a.offset + (tile.sample + joint.sample) * a.offset_step);
                const T x = xy[k].x * scale.x + offset.x, y = xy[k].y * scale.y + offset.y;
                staged[joint.at] = static_cast<int32_t>(coord_token(x, a.canvas, a.max_token));
                staged[joint.at + tile.joints] = static_cast<int32_t>(coord_token(y, a.canvas, a.max_token));
                staged[joint.at + 2 * tile.joints] = visible[k] & coord_inside(x, a.canvas) & coord_inside(y, a.canvas);
            }
        }
    });
    ctx.sync();
    ctx.for_each_thread([&](int t) {
        const int tokens = 3 * tile.count, paired = tiling.pairs ? tokens & ~1 : 0;
        for (int e = 2 * t; e < paired; e += 2 * ctx.threads()) {
            store_pair<int64_t>(a.tokens + tile.tokens + e, {staged[e], staged[e + 1]});
        }
        for (int e = paired + t; e < tokens; e += ctx.threads()) {
            a.tokens[token_index(tiling, tile, a.joints, e)] = staged[e];
        }
    });
    ctx.sync();
}

// staged: 3 * kTileJoints floats.
template <typename Ctx>
M4K_BLOCK void dequantize_block(Ctx& ctx, const DequantizeArgs& a, const Tiling& tiling, float* staged) {
    const Tile tile(tiling, ctx.block(), a.n, a.joints);
    ctx.for_each_thread([&](int t) {
        const int tokens = 3 * tile.count, paired = tiling.pairs ? tokens & ~1 : 0;
        const auto stage = [&](int e, int64_t token) {
            const bool visibility = tiling.parts > 1 ? e >= 2 * tile.joints : divide_by_joints(tiling, e) % 3 == 2;
            staged[e] = visibility ? static_cast<float>(token != 0) : dequantize_coord(token, a.canvas, a.max_token);
        };
        for (int e = 2 * t; e < paired; e += 2 * ctx.threads()) {
            const Pair<int64_t> pair = load_pair(a.tokens + tile.tokens + e);
            stage(e, pair.x);
            stage(e + 1, pair.y);
        }
        for (int e = paired + t; e < tokens; e += ctx.threads()) {
            stage(e, a.tokens[token_index(tiling, tile, a.joints, e)]);
        }
    });
    ctx.sync();
    ctx.for_each_thread([&](int t) {
        for (int q = t; q < tile.count; q += ctx.threads()) {
            const StagedJoint joint(tiling, tile, q);
            store_pair<float>(a.xy + 2 * (tile.first + q), {staged[joint.at], staged[joint.at + tile.joints]});
            a.visible[tile.first + q] = staged[joint.at + 2 * tile.joints] != 0.0f;
        }
    });
    ctx.sync();
}

// The kernels, and the same programs on the host with threads and blocks in an order that depends on the seed.
void quantize_coords_cuda(const QuantizeArgs<float>& args, const Target& target);
void quantize_coords_cuda(const QuantizeArgs<double>& args, const Target& target);
void dequantize_coords_cuda(const DequantizeArgs& args, const Target& target);
void quantize_coords_on_host(const QuantizeArgs<float>& args, uint64_t seed);
void quantize_coords_on_host(const QuantizeArgs<double>& args, uint64_t seed);
void dequantize_coords_on_host(const DequantizeArgs& args, uint64_t seed);

}  // namespace m4k
