// The loops of index building that numpy cannot express, or not as fast: which sentences make up a BERT sample, the order
// of a blend, and a shuffle. bert/mapping.py, blend.py and gpt/index.py hold the same in Python, and say what the results
// mean.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int kVersion = 2;  // native.py refuses another
constexpr int64_t kSpan = 64;  // samples of a blend that are placed at once

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Draws the length of the next sample.
class TargetLength {
 public:
  TargetLength(uint32_t seed, int64_t short_ratio, int64_t longest)
      : random_(seed), short_ratio_(short_ratio), longest_(longest) {}

  int64_t operator()() {
    if (short_ratio_ == 0) return longest_;
    const int64_t drawn = random_();
    return drawn % short_ratio_ == 0 ? 2 + drawn % (longest_ - 1) : longest_;
  }

 private:
  std::mt19937 random_;
  int64_t short_ratio_, longest_;
};

template <typename Id>
class Mapping {
 public:
  using Row = std::array<Id, 3>;

  Mapping(const int64_t* documents, int64_t count, const int32_t* lengths, int64_t least_sentences,
          int64_t longest_sentence)
      : documents_(documents), count_(count), lengths_(lengths), least_(least_sentences), limit_(longest_sentence) {}

  void add_epoch(TargetLength& target) {
    for (int64_t d = 0; d < count_; ++d) add_document(documents_[d], documents_[d + 1], target);
  }

  void shuffle(uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int64_t i = static_cast<int64_t>(rows.size()) - 1; i > 0; --i)
      std::swap(rows[i], rows[random() % static_cast<uint64_t>(i + 1)]);
  }

  std::vector<Row> rows;

 private:
  void add_document(int64_t first, int64_t last, TargetLength& target) {
    const int64_t sentences = last - first;
    if (sentences < least_) return;
    if (sentences > 1 &&
        std::any_of(lengths_ + first, lengths_ + last, [this](int32_t length) { return length > limit_; }))
      return;
    int64_t start = first, tokens = 0, wanted = target();
    for (int64_t s = first; s < last; ++s) {
      tokens += lengths_[s];
      const int64_t left = last - s - 1;
      if ((tokens >= wanted && left > 1 && s - start + 1 >= least_) || left == 0) {
        rows.push_back({static_cast<Id>(start), static_cast<Id>(s + 1), static_cast<Id>(wanted)});
        start = s + 1;
        tokens = 0;
        wanted = target();
      }
    }
  }

  const int64_t* documents_;
  int64_t count_;
  const int32_t* lengths_;
  int64_t least_, limit_;
};

template <typename Id>
py::array mapping(const Array<int64_t>& documents, const Array<int32_t>& lengths, int64_t samples, int64_t longest,
                  int64_t short_ratio, uint32_t seed, int64_t least_sentences, int64_t longest_sentence) {
  Mapping<Id> built(documents.data(), documents.size() - 1, lengths.data(), least_sentences, longest_sentence);
  {
    py::gil_scoped_release release;
    TargetLength target(seed, short_ratio, longest);
    do {
      built.add_epoch(target);
    } while (!built.rows.empty() && static_cast<int64_t>(built.rows.size()) < samples);
    built.shuffle(static_cast<uint64_t>(seed) + 1);
  }
  py::array_t<Id> rows({static_cast<py::ssize_t>(built.rows.size()), static_cast<py::ssize_t>(3)});
  std::copy_n(reinterpret_cast<const Id*>(built.rows.data()), 3 * built.rows.size(), rows.mutable_data());
  return rows;
}

// How far dataset d is behind its share before sample i. Grows with i, also as it is rounded, while d is not drawn.
double behind(double share, int64_t i, int64_t drawn) {
  return share * static_cast<double>(std::max<int64_t>(i, 1)) - static_cast<double>(drawn);
}

// Appends to `chosen` the dataset of each of the samples [begin, end), the first of those that are furthest behind.
//
// Few datasets have to be looked at: of the end - begin that are furthest behind before the first sample, one at least is
// not yet drawn before any later sample, so what is chosen is never less behind than the last of them was; and a dataset
// that is less behind than that even at the end, if it is not drawn, is never chosen.
void blend_span(const double* share, std::vector<int64_t>& drawn, int64_t begin, int64_t end, int16_t* chosen,
                int64_t* position, std::vector<double>& scratch, std::vector<int32_t>& candidates) {
  const int64_t datasets = static_cast<int64_t>(drawn.size()), nth = end - begin - 1;
  candidates.clear();
  double least = -std::numeric_limits<double>::infinity();
  if (nth < datasets) {
    for (int64_t d = 0; d < datasets; ++d) scratch[d] = behind(share[d], begin, drawn[d]);
    std::nth_element(scratch.begin(), scratch.begin() + nth, scratch.end(), std::greater<double>());
    least = scratch[nth];
  }
  for (int64_t d = 0; d < datasets; ++d)
    if (behind(share[d], end - 1, drawn[d]) >= least) candidates.push_back(static_cast<int32_t>(d));
  for (int64_t i = begin; i < end; ++i) {
    int32_t best = candidates[0];
    double furthest = behind(share[best], i, drawn[best]);
    for (const int32_t d : candidates) {
      const double now = behind(share[d], i, drawn[d]);
      if (now > furthest) {
        furthest = now;
        best = d;
      }
    }
    chosen[i] = static_cast<int16_t>(best);
    position[i] = drawn[best]++;
  }
}

py::tuple blend(const Array<double>& shares, int64_t size) {
  py::array_t<int16_t> chosen(size);
  py::array_t<int64_t> position(size);
  const double* share = shares.data();
  int16_t* chosen_data = chosen.mutable_data();
  int64_t* position_data = position.mutable_data();
  {
    py::gil_scoped_release release;
    std::vector<int64_t> drawn(shares.size(), 0);
    std::vector<double> scratch(shares.size());
    std::vector<int32_t> candidates;
    for (int64_t i = 0; i < size; i += kSpan)
      blend_span(share, drawn, i, std::min(size, i + kSpan), chosen_data, position_data, scratch, candidates);
  }
  return py::make_tuple(chosen, position);
}

// The generator of numpy.random.RandomState, from the state that its get_state gives.
class MersenneTwister {
 public:
  MersenneTwister(uint32_t* key, int64_t position) : key_(key), position_(position) {}

  // A number in [0, largest], as RandomState.shuffle draws it.
  uint32_t up_to(uint32_t largest, uint32_t mask) {
    uint32_t value;
    while ((value = next() & mask) > largest) {
    }
    return value;
  }

  int64_t position() const { return position_; }

 private:
  uint32_t next() {
    if (position_ == 624) renew();
    uint32_t y = key_[position_++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
  }

  void renew() {
    for (int i = 0; i < 624; ++i) {
      const uint32_t y = (key_[i] & 0x80000000u) | (key_[(i + 1) % 624] & 0x7fffffffu);
      key_[i] = key_[(i + 397) % 624] ^ (y >> 1) ^ ((y & 1u) ? 0x9908b0dfu : 0u);
    }
    position_ = 0;
  }

  uint32_t* key_;
  int64_t position_;
};

// Shuffles in place; where swaps will go is known some time before, so that memory is there when it is needed. Changes
// the state of the generator and gives its new position.
int64_t shuffle(py::array_t<int32_t, py::array::c_style> values, py::array_t<uint32_t, py::array::c_style> key,
                int64_t position) {
  int32_t* data = values.mutable_data();
  MersenneTwister random(key.mutable_data(), position);
  int64_t i = values.size() - 1;
  py::gil_scoped_release release;
  uint32_t mask = 1;
  while (static_cast<int64_t>(mask) < i) mask = mask << 1 | 1;
  std::array<uint32_t, 256> partners;
  while (i > 0) {
    const int64_t count = std::min<int64_t>(i, partners.size());
    for (int64_t n = 0; n < count; ++n) {
      const uint32_t largest = static_cast<uint32_t>(i - n);
      while (mask >> 1 >= largest) mask >>= 1;
      partners[n] = random.up_to(largest, mask);
      __builtin_prefetch(data + partners[n], 1);
    }
    for (int64_t n = 0; n < count; ++n) std::swap(data[i - n], data[partners[n]]);
    i -= count;
  }
  return random.position();
}

}  // namespace

PYBIND11_MODULE(index_helpers, module) {
  module.attr("VERSION") = kVersion;
  module.def("mapping_uint32", &mapping<uint32_t>);
  module.def("mapping_uint64", &mapping<uint64_t>);
  module.def("blend", &blend);
  module.def("shuffle", &shuffle, py::arg("values").noconvert(), py::arg("key").noconvert(), py::arg("position"));
}
