// Lists of steps: the same as each of them alone, and refused whole where one of them cannot be.

#include <functional>
#include <iterator>

#include "cases.h"

namespace plain {
namespace {

// Images in a list of steps.
struct Value {
  int64_t channels, height, width;
  int32_t block;
  Images images() const { return {channels, height * width, block}; }
  bool operator==(const Value& v) const {
    return channels == v.channels && height == v.height && width == v.width && block == v.block;
  }
};

// Steps of which each works on what any earlier one left, and what they point to.
struct Steps {
  int64_t batch;
  std::vector<Value> values;
  std::vector<secateur_step> steps;
  std::vector<Panelled> packed;
  std::vector<Floats> kernels, biases;

  explicit Steps(Random& random) : batch(random.of<int64_t>({0, 1, 1, 2, 3})) {
    const int64_t count = random.between(0, 7);
    packed.reserve(8), kernels.reserve(8), biases.reserve(8);  // steps point to them
    const bool large = random.chance(0.06);
    const Value first = {random.between(1, 6), random.between(1, large ? 60 : 13), random.between(1, large ? 60 : 40),
                         0};
    for (int64_t i = random.between(1, 2); i > 0; --i) {
      values.push_back(first);
      values.back().block = random.of({0, secateur_image_block()});
    }
    for (int64_t i = 0; i < count; ++i) add(random);
  }
  Steps(const Steps&) = delete;

  void add(Random& random) {
    secateur_step step{};
    const int64_t last = static_cast<int64_t>(values.size()) - 1;
    step.x = static_cast<int32_t>(random.between(last > 2 ? last - 2 : 0, last)), step.residual = -1;
    step.y = static_cast<int32_t>(last + 1);
    const Value x = values[static_cast<size_t>(step.x)];
    Value y = {x.channels, 0, 0, random.of({0, secateur_image_block()})};
    secateur_convolution& s = step.shape;
    s = {batch, x.channels, x.height, x.width, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, x.block, y.block};
    if (random.chance(0.6)) {
      s.kernel_height = s.kernel_width = 3, s.stride_height = s.stride_width = random.of({1, 1, 1, 2});
      s.pad_top = s.pad_left = s.pad_bottom = s.pad_right = 1;
      if (random.chance(0.2)) s.pad_top = s.pad_left = 0;
    }
    step.kind = static_cast<int32_t>(random.between(SECATEUR_CONV2D, SECATEUR_MAX_POOL2D));
    step.activation = static_cast<int32_t>(random.between(0, kActivations - 1));
    if (step.kind == SECATEUR_MAX_POOL2D) step.activation = SECATEUR_NONE;
    if (!fits(s, &y.height, &y.width)) return;
    const int64_t taps = int64_t{s.kernel_height} * s.kernel_width;
    if (step.kind == SECATEUR_CONV2D) {
      y.channels = random.chance(0.5) ? x.channels : random.between(1, 9);
      const std::vector<float> dense = weights(random, y.channels, x.channels * taps);
      packed.push_back(plain::packed(random, dense, y.channels, x.channels * taps));
      step.weight = &packed.back().header, step.tile = random.of({0, 8, 64});
    } else if (step.kind == SECATEUR_DEPTHWISE2D) {
      step.multiplier = random.of<int64_t>({1, 1, 2});
      y.channels *= step.multiplier;
      kernels.push_back(Floats::numbers(random, y.channels * taps));
      step.kernels = kernels.back().data();
    }
    if (step.kind != SECATEUR_MAX_POOL2D) {
      biases.push_back(Floats::numbers(random, y.channels));
      if (random.chance(0.6)) step.bias = biases.back().data();
      for (int32_t i = 0; i <= last; ++i)
        if (values[static_cast<size_t>(i)] == y && random.chance(0.5)) step.residual = i;
    }
    values.push_back(y), steps.push_back(step);
  }

  // Every value in memory of its own, with the same inputs each time.
  std::vector<Floats> buffers(Random& random, const std::vector<Floats>& inputs) const {
    std::vector<Floats> all = inputs;
    for (size_t i = inputs.size(); i < values.size(); ++i) {
      all.emplace_back(random, batch * values[i].images().size());
      for (int64_t k = 0; k < all.back().size(); ++k) all.back()[k] = kUntouched;
    }
    return all;
  }

  // What one step does, called by itself.
  int32_t alone(const secateur_step& step, std::vector<Floats>& all) const {
    const auto at = [&](int32_t i) { return all[static_cast<size_t>(i)].data(); };
    const secateur_epilogue after = {step.bias, step.residual < 0 ? nullptr : at(step.residual), step.activation};
    const secateur_plan plan = {1, step.tile};
    if (step.kind == SECATEUR_CONV2D)
      return secateur_conv2d(step.weight, &step.shape, at(step.x), at(step.y), &after, &plan);
    if (step.kind == SECATEUR_DEPTHWISE2D)
      return secateur_depthwise2d(step.kernels, step.multiplier, &step.shape, at(step.x), at(step.y), &after, &plan);
    return secateur_max_pool2d(&step.shape, at(step.x), at(step.y), &plan);
  }
};

int32_t run(const std::vector<secateur_step>& steps, std::vector<Floats>& all, int32_t threads) {
  std::vector<float*> places;
  for (Floats& one : all) places.push_back(one.data());
  return secateur_run(steps.data(), static_cast<int64_t>(steps.size()), places.data(),
                      static_cast<int64_t>(places.size()), threads);
}

// One step that cannot be: nothing beyond it runs, and nothing is read or written where it must not.
void refused_run(Random& random, const Steps& steps, const std::vector<Floats>& inputs) {
  const int32_t count = static_cast<int32_t>(steps.values.size());
  const std::function<void(secateur_step&)> wrong[] = {
      [&](secateur_step& s) { s.x = random.of({-1, -2, count, INT32_MAX, INT32_MIN}); },
      [&](secateur_step& s) { s.y = random.of({-1, -2, count, INT32_MAX, INT32_MIN}); },
      [&](secateur_step& s) { s.residual = random.of({-2, count, INT32_MAX, INT32_MIN}); },
      [&](secateur_step& s) { s.kind = random.of({-1, 3, INT32_MAX, INT32_MIN}); },
      [&](secateur_step& s) { s.tile = s.kind == SECATEUR_CONV2D ? 24 : 0, s.kind = s.tile == 0 ? 7 : s.kind; },
      [&](secateur_step& s) { s.activation = s.kind == SECATEUR_MAX_POOL2D ? 0 : 6, s.shape.stride_width = 0; },
      [&](secateur_step& s) { s.weight = nullptr, s.multiplier = 0, s.shape.channels = -1; },
      [&](secateur_step& s) { s.shape.pad_left = -1; },
  };
  const size_t at = static_cast<size_t>(random.between(0, static_cast<int64_t>(steps.steps.size()) - 1));
  std::vector<secateur_step> bad = steps.steps;
  wrong[random.between(0, static_cast<int64_t>(std::size(wrong)) - 1)](bad[at]);
  std::vector<Floats> all = steps.buffers(random, inputs);
  expect_status(run(bad, all, 2), SECATEUR_BAD_ARGUMENT, "a step that cannot be");
  for (size_t i = inputs.size() + at; i < all.size(); ++i)
    for (int64_t k = 0; k < all[i].size(); ++k) expect(all[i][k] == kUntouched, "a step ran after one that cannot be");
}

}  // namespace

void run_case(Random& random) {
  const Steps steps(random);
  std::vector<Floats> inputs;
  for (size_t i = 0; i + steps.steps.size() < steps.values.size(); ++i) {
    const Value& v = steps.values[i];
    secateur_convolution s{};
    s.batch = steps.batch, s.channels = v.channels;
    inputs.push_back(some_images(random, s, v.images()));
  }
  const std::vector<std::string> isas = usable_isas();  // which has nothing to do with the order of the steps
  const std::string isa = isas[static_cast<size_t>(random.between(0, static_cast<int64_t>(isas.size()) - 1))];
  expect_status(secateur_use_isa(isa.c_str()), SECATEUR_OK, isa);
  std::vector<Floats> expected = steps.buffers(random, inputs);
  for (const secateur_step& step : steps.steps) expect_status(steps.alone(step, expected), SECATEUR_OK, "a step alone");
  for (int32_t threads = 1; threads <= 3; ++threads) {
    std::vector<Floats> found = steps.buffers(random, inputs);
    expect_status(run(steps.steps, found, threads), SECATEUR_OK, "a run");
    for (size_t i = 0; i < found.size(); ++i)
      expect(same_bits(found[i], expected[i]), "a run on " + isa + " and " + std::to_string(threads) +
                                                   " threads has other bits in value " + std::to_string(i));
  }
  if (!steps.steps.empty()) refused_run(random, steps, inputs);
  std::vector<Floats> all = steps.buffers(random, inputs);
  std::vector<float*> places(all.size());
  for (size_t i = 0; i < all.size(); ++i) places[i] = all[i].data();
  const int64_t count = static_cast<int64_t>(steps.steps.size()), buffers = static_cast<int64_t>(places.size());
  const auto refused = [](int32_t status, const char* what) { expect_status(status, SECATEUR_BAD_ARGUMENT, what); };
  refused(secateur_run(steps.steps.data(), -1, places.data(), buffers, 1), "a negative number of steps");
  expect_status(secateur_run(nullptr, 0, nullptr, 0, 1), SECATEUR_OK, "no steps");
  if (count == 0) return;
  refused(secateur_run(nullptr, count, places.data(), buffers, 1), "steps that are nowhere");
  refused(secateur_run(steps.steps.data(), count, nullptr, buffers, 1), "buffers that are nowhere");
  refused(secateur_run(steps.steps.data(), count, places.data(), 0, 1), "no buffers");
  refused(secateur_run(steps.steps.data(), count, places.data(), -1, 1), "a negative number of buffers");
  refused(secateur_run(steps.steps.data(), count, places.data(), buffers, -1), "a negative number of threads");
}

}  // namespace plain
