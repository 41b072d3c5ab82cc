/* Sparse kernels on the CPU, behind a plain C interface: no Python, no torch.
 *
 * Weights are matrices of `rows` outputs and `columns` inputs in float32, of which only blocks with a non-zero are
 * stored. All arrays belong to the caller, also those of a packed weight: they can lie in a memory-mapped file.
 * A function returns 0, or a code that secateur_error turns into words; it never aborts.
 */
#ifndef SECATEUR_SPARSE_H
#define SECATEUR_SPARSE_H

#include <stdint.h>

#if defined(_WIN32)
#define SECATEUR_API __declspec(dllexport)
#else
#define SECATEUR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes with every change of a struct, a format or the meaning of an argument. */
#define SECATEUR_ABI 3

enum secateur_status {
  SECATEUR_OK = 0,
  SECATEUR_BAD_ARGUMENT = 1,
  SECATEUR_NO_MEMORY = 2,
  SECATEUR_CORRUPT = 3,
  SECATEUR_UNKNOWN_ISA = 4,
  SECATEUR_UNSUPPORTED_ISA = 5,
};

/* What is done to a sum before it is stored: after the bias and the residual have been added. */
enum secateur_activation {
  SECATEUR_NONE = 0,
  SECATEUR_RELU = 1,
  SECATEUR_RELU6 = 2,
  SECATEUR_GELU = 3,      /* x Phi(x), by the error function */
  SECATEUR_GELU_TANH = 4, /* the approximation by tanh */
  SECATEUR_SILU = 5,
};

/* Compressed rows, cut into panels of columns so that the activations of one panel stay in the first-level cache.
 *
 * Rows are taken in groups of `block_rows`, columns in groups of `block_columns`; a block is stored whole when any of
 * its weights is not zero. Row groups are split into `parts` of equal size: one after the other passes over all panels,
 * and threads work on them apart. Within one part and one panel they are sorted by their number of blocks, most first;
 * `runs` has one pair (blocks in each group, groups) for every such number, and `order` names the groups, counted from
 * the part's first. `indices` says where a block begins, in blocks of columns from its panel's first; one byte each
 * where a panel has at most 256 blocks of columns, else two. `values` has block_rows * block_columns weights for every
 * block, row after row.
 *
 * `starts` has three entries for each pair (part, panel), parts first, and three at the end: the first run, the first
 * group in `order`, the first block. `indices` has SECATEUR_SLACK entries more than there are blocks.
 */
#define SECATEUR_SLACK 8

typedef struct secateur_panelled {
  int64_t rows, columns;
  int32_t block_rows, block_columns; /* 1x1, 4x1 or 1x4 */
  int32_t panel;                     /* columns of a panel, a multiple of block_columns */
  int32_t parts;
  int32_t index_bytes;
  int64_t blocks, run_count;
  const float* values;
  const void* indices;
  const int32_t* order;
  const int32_t* runs;
  const int64_t* starts;
} secateur_panelled;

/* One bit per weight, least significant first, in words of 64 columns; the last word of a row is filled with zeros.
 * `values` has the non-zero weights row after row, and `offsets` where each row begins (rows + 1 entries).
 * `values` has SECATEUR_BITMASK_SLACK entries more than there are weights.
 */
#define SECATEUR_BITMASK_SLACK 16

typedef struct secateur_bitmask {
  int64_t rows, columns;
  int64_t count;
  const float* values;
  const uint64_t* bits;
  const int64_t* offsets;
} secateur_bitmask;

/* What comes after the sum. Any pointer may be NULL. The residual is laid out as the output is. */
typedef struct secateur_epilogue {
  const float* bias;
  const float* residual;
  int32_t activation;
} secateur_epilogue;

/* How a product is carried out. Zero in any field leaves the choice to the library. */
typedef struct secateur_plan {
  int32_t threads; /* at least 1 */
  int32_t tile;    /* columns of activations that are worked on at a time: a power of two, or 0 */
} secateur_plan;

SECATEUR_API int32_t secateur_abi(void);
SECATEUR_API const char* secateur_error(int32_t status);

/* Names of the instruction sets that this library was built for, and of those that this processor has, best first,
 * separated by spaces. */
SECATEUR_API const char* secateur_isas(void);
SECATEUR_API const char* secateur_usable_isas(void);
/* Which one is in use; at first the best, or the one that the environment variable SECATEUR_ISA names. */
SECATEUR_API const char* secateur_isa(void);
SECATEUR_API int32_t secateur_use_isa(const char* name);

/* Lets the threads of another runtime do the work instead of the library's own: `parallel` is called as GOMP_parallel of
 * libgomp is. NULL goes back. A forked child starts with its own. */
typedef void (*secateur_parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
SECATEUR_API void secateur_use_parallel(secateur_parallel parallel);

/* Packing, in two calls: sizes first, then the contents of arrays of that size. `weights` is dense, row after row. */
SECATEUR_API int32_t secateur_panelled_sizes(const float* weights, int64_t rows, int64_t columns, int32_t block_rows,
                                             int32_t block_columns, int32_t panel, int32_t parts, int64_t* blocks,
                                             int64_t* run_count);
SECATEUR_API int32_t secateur_panelled_pack(const float* weights, const secateur_panelled* packed, float* values,
                                            void* indices, int32_t* order, int32_t* runs, int64_t* starts);
SECATEUR_API int32_t secateur_bitmask_count(const float* weights, int64_t rows, int64_t columns, int64_t* count);
SECATEUR_API int32_t secateur_bitmask_pack(const float* weights, const secateur_bitmask* packed, float* values,
                                           uint64_t* bits, int64_t* offsets);

/* Every index in bounds, every count consistent: what a file says is checked before a kernel follows it. The lengths
 * are those of the arrays. */
SECATEUR_API int32_t secateur_panelled_check(const secateur_panelled* packed, int64_t values, int64_t indices,
                                             int64_t order, int64_t runs, int64_t starts);
SECATEUR_API int32_t secateur_bitmask_check(const secateur_bitmask* packed, int64_t values, int64_t bits,
                                            int64_t offsets);

/* Back to dense: `weights` has rows * columns entries, which are overwritten. */
SECATEUR_API int32_t secateur_panelled_unpack(const secateur_panelled* packed, float* weights);
SECATEUR_API int32_t secateur_bitmask_unpack(const secateur_bitmask* packed, float* weights);

/* y = act(W x + b + r) for `count` vectors. `x_step` and `y_step` are the distances between two vectors, `x_stride` and
 * `y_stride` those between two features, in floats; one of each pair is 1. */
SECATEUR_API int32_t secateur_spmm(const secateur_panelled* weight, const float* x, int64_t x_step, int64_t x_stride,
                                   float* y, int64_t y_step, int64_t y_stride, int64_t count,
                                   const secateur_epilogue* epilogue, const secateur_plan* plan);

/* The same for one vector. */
SECATEUR_API int32_t secateur_gemv(const secateur_panelled* weight, const float* x, float* y,
                                   const secateur_epilogue* epilogue, const secateur_plan* plan);
SECATEUR_API int32_t secateur_gemv_bitmask(const secateur_bitmask* weight, const float* x, float* y,
                                           const secateur_epilogue* epilogue, const secateur_plan* plan);

/* Convolution; columns of the weight run over channels, then kernel rows, then kernel columns.
 *
 * Images are [batch][channels][height][width], contiguous, where the block is 0. With a block b they are in the kernels'
 * own layout, [batch][ceil(height * width / b)][channels][b]: b pixels side by side, and all channels of these one after
 * the other, so that a product reads and writes one run of memory. Lanes beyond the last pixel hold anything finite. The
 * block is secateur_image_block() or 0; the residual is laid out as the output is.
 */
typedef struct secateur_convolution {
  int64_t batch, channels, height, width;
  int32_t kernel_height, kernel_width;
  int32_t stride_height, stride_width;
  int32_t pad_top, pad_left, pad_bottom, pad_right;
  int32_t dilation_height, dilation_width;
  int32_t x_block, y_block;
} secateur_convolution;

/* Pixels in a block of the kernels' own layout: 64, whatever the instruction set, so that images can change hands. */
SECATEUR_API int32_t secateur_image_block(void);

SECATEUR_API int32_t secateur_conv2d(const secateur_panelled* weight, const secateur_convolution* shape, const float* x,
                                     float* y, const secateur_epilogue* epilogue, const secateur_plan* plan);

/* Depthwise convolution, dense: every channel of the input gives `multiplier` channels of the output, one after the
 * other. `weights` is [channels * multiplier][kernel_height * kernel_width]. */
SECATEUR_API int32_t secateur_depthwise2d(const float* weights, int64_t multiplier, const secateur_convolution* shape,
                                          const float* x, float* y, const secateur_epilogue* epilogue,
                                          const secateur_plan* plan);

/* The largest of what the kernel sees, in every channel of its own, in either layout. What is beside the image is never
 * the largest. */
SECATEUR_API int32_t secateur_max_pool2d(const secateur_convolution* shape, const float* x, float* y,
                                         const secateur_plan* plan);

/* One of several calls on images that follow each other. */
enum secateur_step_kind { SECATEUR_CONV2D = 0, SECATEUR_DEPTHWISE2D = 1, SECATEUR_MAX_POOL2D = 2 };

typedef struct secateur_step {
  int32_t kind;
  int32_t x, residual, y; /* places in `buffers`; there may be no residual: -1 */
  int32_t activation;
  int32_t tile;                    /* of a convolution */
  const secateur_panelled* weight; /* of a convolution */
  const float* kernels;            /* of a depthwise convolution */
  int64_t multiplier;              /* of a depthwise convolution */
  const float* bias;
  secateur_convolution shape;
} secateur_step;

/* Runs them one after the other, and stops at the first that fails. */
SECATEUR_API int32_t secateur_run(const secateur_step* steps, int64_t count, float* const* buffers,
                                  int64_t buffer_count, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
