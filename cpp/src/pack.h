#pragma once

#include <cstdint>

#include "secateur_sparse.h"

namespace secateur {

int32_t panelled_sizes(const float* weights, const secateur_panelled& w, int64_t* blocks, int64_t* runs);
int32_t panelled_pack(const float* weights, const secateur_panelled& w, float* values, void* indices, int32_t* order,
                      int32_t* runs, int64_t* starts);
int32_t panelled_check(const secateur_panelled& w, int64_t values, int64_t indices, int64_t order, int64_t runs,
                       int64_t starts);
int32_t panelled_unpack(const secateur_panelled& w, float* weights);
int32_t bitmask_count(const float* weights, int64_t rows, int64_t columns, int64_t* count);
int32_t bitmask_pack(const float* weights, const secateur_bitmask& w, float* values, uint64_t* bits, int64_t* offsets);
int32_t bitmask_check(const secateur_bitmask& w, int64_t values, int64_t bits, int64_t offsets);
int32_t bitmask_unpack(const secateur_bitmask& w, float* weights);

}  // namespace secateur
