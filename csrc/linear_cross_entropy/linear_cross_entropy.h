// Cross-entropy over a chunk of logits, and the plan of the chunks. The specification is
// m4kernels/ops/linear_cross_entropy/reference.py; the matrix products are the library's, called from cpp.py.
#pragma once

#include <cstdint>
#include <vector>

#include "common/simd.h"

namespace m4k {

// The tokens of a call, all (tokens,). Element types are the caller's; a null pointer stands for the default.
template <typename T>
struct TokenArgs {
    const int64_t* targets;
    const void* vocab_limit;  // null: every class; else integers of limit_bytes
    int limit_bytes;          // 4 or 8
    const T* token_weight;    // null: 1 / number of valid tokens
    int64_t tokens;
    int64_t classes;
    int64_t ignore_index;
};

// The valid tokens in the order of the computation: widest vocabulary first, then ascending. Room for `tokens` each.
template <typename T>
struct OrderedTokens {
    int64_t* order;  // index of the token
    int64_t* limit;  // its number of classes
    T* scale;        // its factor in the loss
};

// Fills `out`; returns the number of valid tokens, or -1 - t when token t has a target outside [0, limit) or a limit
// above the number of classes.
int64_t order_tokens(const TokenArgs<float>& args, const OrderedTokens<float>& out);
int64_t order_tokens(const TokenArgs<double>& args, const OrderedTokens<double>& out);

struct Chunk {
    int64_t first;  // of the ordered tokens
    int64_t rows;
    int64_t width;  // classes: the largest limit among the rows
};

struct ChunkBudget {
    int64_t bytes;      // of a chunk
    int64_t per_logit;  // bytes
    int64_t per_row;    // bytes besides the logits
    int64_t max_rows;
};

// Cuts `count` ordered tokens into chunks within the budget, of one row at least.
std::vector<Chunk> plan_chunks(const int64_t* limit, int64_t count, const ChunkBudget& budget);

template <typename T>
struct LogitsArgs {
    T* logits;               // (rows, width) contiguous; overwritten by d loss / d logits when `gradient`
    const int64_t* order;    // (rows,) token of each row
    const int64_t* limit;    // (rows,) classes from limit on count for nothing; their gradient is 0
    const T* scale;          // (rows,)
    const int64_t* targets;  // (tokens,)
    T* nll;                  // (tokens,)
    bool* correct;           // (tokens,)
    int64_t rows;
    int64_t width;
    bool gradient;
    int threads;
};

M4K_DECLARE_LEVELS(void, cross_entropy_f32, (const LogitsArgs<float>& args))
M4K_DECLARE_LEVELS(void, cross_entropy_f64, (const LogitsArgs<double>& args))

// The entry points: run the level in use.
void cross_entropy(const LogitsArgs<float>& args);
void cross_entropy(const LogitsArgs<double>& args);

}  // namespace m4k
