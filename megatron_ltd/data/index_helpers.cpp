// The loops of index building that numpy cannot express: which sentences make up a BERT sample, and the order of a
// blend. bert_mapping.py and blend.py hold the same in Python, and say what the results mean.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int kVersion = 1;  // native.py refuses another

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

py::tuple blend(const Array<double>& shares, int64_t size) {
  py::array_t<int16_t> chosen(size);
  py::array_t<int64_t> position(size);
  const double* share = shares.data();
  const int64_t datasets = shares.size();
  int16_t* chosen_data = chosen.mutable_data();
  int64_t* position_data = position.mutable_data();
  {
    py::gil_scoped_release release;
    std::vector<int64_t> drawn(datasets, 0);
    for (int64_t i = 0; i < size; ++i) {
      const double samples = static_cast<double>(std::max<int64_t>(i, 1));
      int64_t best = 0;
      double furthest = share[0] * samples - static_cast<double>(drawn[0]);
      for (int64_t d = 1; d < datasets; ++d) {
        const double behind = share[d] * samples - static_cast<double>(drawn[d]);
        if (behind > furthest) {
          furthest = behind;
          best = d;
        }
      }
      chosen_data[i] = static_cast<int16_t>(best);
      position_data[i] = drawn[best]++;
    }
  }
  return py::make_tuple(chosen, position);
}

}  // namespace

PYBIND11_MODULE(index_helpers, module) {
  module.attr("VERSION") = kVersion;
  module.def("mapping_uint32", &mapping<uint32_t>);
  module.def("mapping_uint64", &mapping<uint64_t>);
  module.def("blend", &blend);
}
