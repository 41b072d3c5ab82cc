// A randomised test of the C interface: fuzz [CASES [FIRST]]. Every case is made from its own number, so that
// `fuzz 1 N` repeats case N alone. Built with sanitizers it also finds what reads or writes where it must not.

#include <cinttypes>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "plain.h"

#if defined(__SANITIZE_ADDRESS__)
// Memory that nobody has written is not a number, so that whoever computes with it is found out.
extern "C" const char* __asan_default_options() { return "max_malloc_fill_size=1000000000:malloc_fill_byte=255"; }
#endif

int main(int argc, char** argv) {
  using namespace plain;
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 400, first = argc > 2 ? std::atoll(argv[2]) : 0;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "in case %lld\n", static_cast<long long>(current_case)); });
#endif
  for (int64_t& i = current_case = first; i < first + cases; ++i) {
    Random random(static_cast<uint64_t>(i));
    product_case(random);
    convolution_case(random);
    max_pool_case(random);
    depthwise_case(random);
    run_case(random);
    damage_case(random);
  }
  refusals();
  fork_case();
  concurrent_callers(static_cast<int>(cases));
  std::printf("%" PRId64 " cases on %s: all equal to the plain loops\n", cases, secateur_usable_isas());
  return 0;
}
