// Products with vectors in any layout, and with one vector.

#include "cases.h"

namespace plain {
namespace {

int64_t some_size(Random& random, int64_t most) {
  const int64_t size = random.of<int64_t>({0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200});
  return size <= most ? size : random.between(1, most);
}

// Sums of every output and where it lies, for positions in `x` laid out in any way.
std::vector<Sum> plain_product(const std::vector<float>& w, int64_t rows, int64_t columns, const Floats& x,
                               const Places& from, int64_t count) {
  std::vector<Sum> sums(static_cast<size_t>(rows * count));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        sums[static_cast<size_t>(i * rows + r)].multiply(w[static_cast<size_t>(r * columns + c)], x[from.at(i, c)]);
  return sums;
}

void compare(const std::vector<Sum>& sums, int64_t rows, const Places& to, int64_t count, const Afterwards& after,
             const Floats& y, const std::string& what) {
  std::vector<char> written(static_cast<size_t>(y.size()));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      Sum sum = sums[static_cast<size_t>(i * rows + r)];
      const int64_t at = to.at(i, r);
      after.add(sum, r, at);
      written[static_cast<size_t>(at)] = 1;
      if (close(sum, after.epilogue.activation, y[at])) continue;
      fail(what + ", activation " + std::to_string(after.epilogue.activation) + ": row " + std::to_string(r) +
           " of vector " + std::to_string(i) + " is " + std::to_string(y[at]) + ", expected " +
           std::to_string(activated(sum.value, after.epilogue.activation)) + " of " + std::to_string(sum.value));
    }
  for (int64_t i = 0; i < y.size(); ++i)
    expect(written[static_cast<size_t>(i)] || y[i] == kUntouched, what + ": wrote between its outputs");
}

void one_vector(Random& random, const std::vector<float>& dense, const Panelled& w, const std::string& isa) {
  const int64_t rows = w.header.rows, columns = w.header.columns;
  Floats x = Floats::numbers(random, columns);
  poison(random, x);
  const Places from = {columns, 1, columns}, to = {rows, 1, rows};
  const Afterwards after(random, rows, rows);
  const std::vector<Sum> sums = plain_product(dense, rows, columns, x, from, 1);
  const auto check = [&](const char* function, auto run) {
    const std::string what = named(function, w, isa, {0, 0});
    compare(sums, rows, to, 1, after, on_threads(random, rows, 0, what, run), what);
  };
  check("gemv", [&](float* y, const secateur_plan& plan) {
    return secateur_gemv(&w.header, x.data(), y, &after.epilogue, &plan);
  });
  const Bitmask bits(dense, rows, columns);
  expect_status(bits.check(), SECATEUR_OK, "bitmask_check");
  std::vector<float> back(dense.size(), kUntouched);
  expect_status(secateur_bitmask_unpack(&bits.header, back.data()), SECATEUR_OK, "bitmask_unpack");
  expect(back == dense, "a bitmask comes back as it was");
  check("gemv_bitmask", [&](float* y, const secateur_plan& plan) {
    return secateur_gemv_bitmask(&bits.header, x.data(), y, &after.epilogue, &plan);
  });
}

}  // namespace

void product_case(Random& random) {
  const int64_t rows = some_size(random, 200),
                columns = random.chance(0.1) ? random.between(258, 1200) : some_size(random, 200);
  const int64_t count = some_size(random, columns > 200 ? 20 : 129);
  const std::vector<float> dense = weights(random, rows, columns);
  const Panelled w = packed(random, dense, rows, columns);
  for (int layout = 0; layout < 2; ++layout) {
    const Places from = Places::of(random, count, columns, random.chance(0.5));
    const Places to = Places::of(random, count, rows, random.chance(0.5));
    Floats x = Floats::numbers(random, from.size);
    poison(random, x);
    const Afterwards after(random, rows, to.size);
    const std::vector<Sum> sums = plain_product(dense, rows, columns, x, from, count);
    for (const std::string& isa : usable_isas()) {
      expect_status(secateur_use_isa(isa.c_str()), SECATEUR_OK, isa);
      const int32_t tile = random.of({0, 1, 4, 8, 16, 32, 64, 128, 256});
      const std::string what = named("spmm", w, isa, {0, tile}) + ", " + std::to_string(count) + " vectors, x " +
                               std::to_string(from.step) + " y " + std::to_string(to.step);
      const Floats y = on_threads(random, to.size, tile, what, [&](float* out, const secateur_plan& plan) {
        return secateur_spmm(&w.header, x.data(), from.step, from.stride, out, to.step, to.stride, count,
                             &after.epilogue, &plan);
      });
      compare(sums, rows, to, count, after, y, what);
      if (layout == 0) one_vector(random, dense, w, isa);
    }
  }
}

}  // namespace plain
