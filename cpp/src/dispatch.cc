// The C interface: arguments are checked here, once, and the rest is left to the kernels of the instruction set in use.

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "kernels.h"
#include "layout.h"
#include "pack.h"
#include "pool.h"

namespace secateur {
namespace {

// Best first.
constexpr const Kernels* kBuilt[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &kernels_v4, &kernels_v3, &kernels_v2,
#elif defined(__aarch64__) || defined(_M_ARM64)
    &kernels_neon,
#endif
};

const Kernels* named(const char* name) {
  for (const Kernels* k : kBuilt)
    if (std::strcmp(k->name, name) == 0) return k;
  return nullptr;
}

const Kernels* at_first() {
  const char* wanted = std::getenv("SECATEUR_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    const Kernels* k = named(wanted);
    return k != nullptr && k->usable() ? k : nullptr;  // asked for and not there: every call says so
  }
  for (const Kernels* k : kBuilt)
    if (k->usable()) return k;
  return nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{at_first()};
  return kernels;
}

bool sound(const secateur_bitmask* w) { return w != nullptr && countable(w->rows, w->columns); }

bool sound(const secateur_epilogue& e) { return e.activation >= SECATEUR_NONE && e.activation <= SECATEUR_SILU; }

bool sound(const secateur_plan& p) {
  return p.threads >= 0 && p.tile >= 0 && p.tile <= 256 && (p.tile & (p.tile - 1)) == 0;
}

// Whether the kernel fits in the image, and no size of it goes beyond 64 bits.
bool sound(const secateur_convolution& s, int64_t outputs) {
  if (s.batch < 0 || s.channels < 0 || s.height < 0 || s.width < 0) return false;
  if (s.batch > kMost || s.channels > kMost || s.height > kMost || s.width > kMost) return false;
  for (int32_t n :
       {s.kernel_height, s.kernel_width, s.stride_height, s.stride_width, s.dilation_height, s.dilation_width})
    if (n < 1) return false;
  for (int32_t n : {s.pad_top, s.pad_left, s.pad_bottom, s.pad_right})
    if (n < 0) return false;
  for (int32_t n : {s.x_block, s.y_block})
    if (n != 0 && n != kImageBlock) return false;
  const int64_t height = s.height + s.pad_top + s.pad_bottom, width = s.width + s.pad_left + s.pad_right;
  if (height <= int64_t{s.kernel_height - 1} * s.dilation_height) return false;
  if (width <= int64_t{s.kernel_width - 1} * s.dilation_width) return false;
  const double image = static_cast<double>(height) * static_cast<double>(width) * static_cast<double>(s.batch + 1);
  const double deepest = static_cast<double>((s.channels > outputs ? s.channels : outputs) + 1);
  return image * deepest <= static_cast<double>(kMost);
}

bool sound(const secateur_convolution& s, const secateur_panelled& w) {
  if (!sound(s, w.rows)) return false;
  const int64_t taps = int64_t{s.kernel_height} * s.kernel_width;
  return w.columns % taps == 0 && w.columns / taps == s.channels;
}

constexpr secateur_epilogue kNothing = {nullptr, nullptr, SECATEUR_NONE};
constexpr secateur_plan kDefault = {1, 0};

// Runs a kernel with defaults filled in; exceptions of the standard library end here.
template <class Run>
int32_t guarded(const secateur_epilogue* epilogue, const secateur_plan* plan, Run run) {
  const Kernels* kernels = current().load(std::memory_order_acquire);
  if (kernels == nullptr) return SECATEUR_UNSUPPORTED_ISA;
  const secateur_epilogue after = epilogue != nullptr ? *epilogue : kNothing;
  secateur_plan how = plan != nullptr ? *plan : kDefault;
  if (!sound(after) || !sound(how)) return SECATEUR_BAD_ARGUMENT;
  if (how.threads == 0) how.threads = 1;
  if (how.threads > kMostThreads) how.threads = kMostThreads;
  try {
    return run(*kernels, after, how);
  } catch (const std::bad_alloc&) {
    return SECATEUR_NO_MEMORY;
  }
}

template <class Run>
int32_t guarded(Run run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return SECATEUR_NO_MEMORY;
  }
}

const char* joined(bool usable_only) {
  static thread_local std::string text;
  text.clear();
  for (const Kernels* k : kBuilt) {
    if (usable_only && !k->usable()) continue;
    if (!text.empty()) text += ' ';
    text += k->name;
  }
  return text.c_str();
}

}  // namespace
}  // namespace secateur

using namespace secateur;

extern "C" {

int32_t secateur_abi(void) { return SECATEUR_ABI; }

const char* secateur_error(int32_t status) {
  switch (status) {
    case SECATEUR_OK: return "no error";
    case SECATEUR_BAD_ARGUMENT: return "an argument is out of range";
    case SECATEUR_NO_MEMORY: return "out of memory";
    case SECATEUR_CORRUPT: return "the packed weight is damaged: its indices and counts do not fit each other";
    case SECATEUR_UNKNOWN_ISA: return "this library was not built for that instruction set";
    case SECATEUR_UNSUPPORTED_ISA: return "this processor does not have that instruction set";
    default: return "unknown status";
  }
}

const char* secateur_isas(void) { return joined(false); }
const char* secateur_usable_isas(void) { return joined(true); }

const char* secateur_isa(void) {
  const Kernels* kernels = current().load(std::memory_order_acquire);
  return kernels != nullptr ? kernels->name : "";
}

int32_t secateur_image_block(void) { return kImageBlock; }

int32_t secateur_use_isa(const char* name) {
  const Kernels* kernels = name != nullptr ? named(name) : nullptr;
  if (kernels == nullptr) return SECATEUR_UNKNOWN_ISA;
  if (!kernels->usable()) return SECATEUR_UNSUPPORTED_ISA;
  current().store(kernels, std::memory_order_release);
  return SECATEUR_OK;
}

void secateur_use_parallel(secateur_parallel parallel) { use_parallel(parallel); }

int32_t secateur_panelled_sizes(const float* weights, int64_t rows, int64_t columns, int32_t block_rows,
                                int32_t block_columns, int32_t panel, int32_t parts, int64_t* blocks,
                                int64_t* run_count) {
  secateur_panelled w{};
  w.rows = rows;
  w.columns = columns;
  w.block_rows = block_rows;
  w.block_columns = block_columns;
  w.panel = panel;
  w.parts = parts;
  w.index_bytes = block_columns > 0 ? index_bytes_of(panel / block_columns) : 0;
  if (!sound(&w) || blocks == nullptr || run_count == nullptr) return SECATEUR_BAD_ARGUMENT;
  return guarded([&] { return panelled_sizes(weights, w, blocks, run_count); });
}

int32_t secateur_panelled_pack(const float* weights, const secateur_panelled* packed, float* values, void* indices,
                               int32_t* order, int32_t* runs, int64_t* starts) {
  if (!sound(packed)) return SECATEUR_BAD_ARGUMENT;
  return guarded([&] { return panelled_pack(weights, *packed, values, indices, order, runs, starts); });
}

int32_t secateur_panelled_check(const secateur_panelled* packed, int64_t values, int64_t indices, int64_t order,
                                int64_t runs, int64_t starts) {
  if (!sound(packed)) return SECATEUR_CORRUPT;
  return guarded([&] { return panelled_check(*packed, values, indices, order, runs, starts); });
}

int32_t secateur_panelled_unpack(const secateur_panelled* packed, float* weights) {
  if (!sound(packed)) return SECATEUR_BAD_ARGUMENT;
  return panelled_unpack(*packed, weights);
}

int32_t secateur_bitmask_count(const float* weights, int64_t rows, int64_t columns, int64_t* count) {
  if (!countable(rows, columns) || count == nullptr) return SECATEUR_BAD_ARGUMENT;
  return bitmask_count(weights, rows, columns, count);
}

int32_t secateur_bitmask_pack(const float* weights, const secateur_bitmask* packed, float* values, uint64_t* bits,
                              int64_t* offsets) {
  if (!sound(packed)) return SECATEUR_BAD_ARGUMENT;
  return bitmask_pack(weights, *packed, values, bits, offsets);
}

int32_t secateur_bitmask_check(const secateur_bitmask* packed, int64_t values, int64_t bits, int64_t offsets) {
  if (!sound(packed)) return SECATEUR_CORRUPT;
  return bitmask_check(*packed, values, bits, offsets);
}

int32_t secateur_bitmask_unpack(const secateur_bitmask* packed, float* weights) {
  if (!sound(packed)) return SECATEUR_BAD_ARGUMENT;
  return bitmask_unpack(*packed, weights);
}

int32_t secateur_spmm(const secateur_panelled* weight, const float* x, int64_t x_step, int64_t x_stride, float* y,
                      int64_t y_step, int64_t y_stride, int64_t count, const secateur_epilogue* epilogue,
                      const secateur_plan* plan) {
  if (!sound(weight) || count < 0 || count > kMost) return SECATEUR_BAD_ARGUMENT;
  // One of a pair is 1; vectors and features of the output must not lie on top of each other.
  if ((x_step != 1 && x_stride != 1) || (y_step != 1 && y_stride != 1)) return SECATEUR_BAD_ARGUMENT;
  if (y_stride == 1 ? y_step < weight->rows && count > 1 : y_stride < count && weight->rows > 1)
    return SECATEUR_BAD_ARGUMENT;
  return guarded(epilogue, plan, [&](const Kernels& k, const secateur_epilogue& after, const secateur_plan& how) {
    return k.spmm(*weight, x, x_step, x_stride, y, y_step, y_stride, count, after, how);
  });
}

int32_t secateur_gemv(const secateur_panelled* weight, const float* x, float* y, const secateur_epilogue* epilogue,
                      const secateur_plan* plan) {
  if (!sound(weight)) return SECATEUR_BAD_ARGUMENT;
  return guarded(epilogue, plan, [&](const Kernels& k, const secateur_epilogue& after, const secateur_plan& how) {
    return k.gemv(*weight, x, y, after, how);
  });
}

int32_t secateur_gemv_bitmask(const secateur_bitmask* weight, const float* x, float* y,
                              const secateur_epilogue* epilogue, const secateur_plan* plan) {
  if (!sound(weight)) return SECATEUR_BAD_ARGUMENT;
  return guarded(epilogue, plan, [&](const Kernels& k, const secateur_epilogue& after, const secateur_plan& how) {
    return k.gemv_bitmask(*weight, x, y, after, how);
  });
}

int32_t secateur_conv2d(const secateur_panelled* weight, const secateur_convolution* shape, const float* x, float* y,
                        const secateur_epilogue* epilogue, const secateur_plan* plan) {
  if (!sound(weight) || shape == nullptr || !sound(*shape, *weight)) return SECATEUR_BAD_ARGUMENT;
  return guarded(epilogue, plan, [&](const Kernels& k, const secateur_epilogue& after, const secateur_plan& how) {
    return k.conv2d(*weight, *shape, x, y, after, how);
  });
}

int32_t secateur_depthwise2d(const float* weights, int64_t multiplier, const secateur_convolution* shape,
                             const float* x, float* y, const secateur_epilogue* epilogue, const secateur_plan* plan) {
  if (shape == nullptr || multiplier < 1 || !countable(shape->channels, multiplier)) return SECATEUR_BAD_ARGUMENT;
  if (!sound(*shape, shape->channels * multiplier)) return SECATEUR_BAD_ARGUMENT;
  return guarded(epilogue, plan, [&](const Kernels& k, const secateur_epilogue& after, const secateur_plan& how) {
    return k.depthwise2d(weights, multiplier, *shape, x, y, after, how);
  });
}

int32_t secateur_max_pool2d(const secateur_convolution* shape, const float* x, float* y, const secateur_plan* plan) {
  if (shape == nullptr || !sound(*shape, shape->channels)) return SECATEUR_BAD_ARGUMENT;
  return guarded(nullptr, plan, [&](const Kernels& k, const secateur_epilogue&, const secateur_plan& how) {
    return k.max_pool2d(*shape, x, y, how);
  });
}

int32_t secateur_run(const secateur_step* steps, int64_t count, float* const* buffers, int64_t buffer_count,
                     int32_t threads) {
  if (count < 0 || (count > 0 && (steps == nullptr || buffers == nullptr))) return SECATEUR_BAD_ARGUMENT;
  const auto there = [&](int32_t i) { return i >= 0 && i < buffer_count; };
  for (int64_t i = 0; i < count; ++i) {
    const secateur_step& step = steps[i];
    if (!there(step.x) || !there(step.y) || (step.residual != -1 && !there(step.residual)))
      return SECATEUR_BAD_ARGUMENT;
    const float *x = buffers[step.x], *residual = step.residual == -1 ? nullptr : buffers[step.residual];
    float* y = buffers[step.y];
    const secateur_epilogue after = {step.bias, residual, step.activation};
    const secateur_plan plan = {threads, step.tile};
    int32_t status = SECATEUR_BAD_ARGUMENT;
    switch (step.kind) {
      case SECATEUR_CONV2D: status = secateur_conv2d(step.weight, &step.shape, x, y, &after, &plan); break;
      case SECATEUR_DEPTHWISE2D:
        status = secateur_depthwise2d(step.kernels, step.multiplier, &step.shape, x, y, &after, &plan);
        break;
      case SECATEUR_MAX_POOL2D: status = secateur_max_pool2d(&step.shape, x, y, &plan); break;
      default: break;
    }
    if (status != SECATEUR_OK) return status;
  }
  return SECATEUR_OK;
}

}  // extern "C"
