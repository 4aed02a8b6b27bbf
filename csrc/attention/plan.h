// How queries are put into panels and keys into tiles: so that of a mask over a picture little is computed in vain.
#pragma once

#include "attention/args.h"
#include "attention/math.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

// Keys [key, key + count) of a tile.
struct KeyTile {
  int64_t key, count;
};

// The tiles of a head's keys. With a mask over pictures a tile is a part of a row (of narrow ones a few whole rows), so
// that all of it is near or far.
class Tiling {
 public:
  explicit Tiling(const ForwardArgs& a)
      : keys_(a.keys), row_(row_of(a.mask.width)), even_(a.mask.width == 0), pieces_(row_) {}

  int64_t number() const { return even_ ? ceil_divide(keys_, kTile) : tile_of(keys_ - 1) + 1; }

  // The tile that holds a key, of at least one.
  int64_t tile_of(int64_t key) const {
    if (keys_ == 0) return -1;
    if (even_) return key / kTile;
    const int64_t longer = pieces_.longer * (pieces_.size + 1), column = key % row_;
    const int64_t piece =
        column < longer ? column / (pieces_.size + 1) : pieces_.longer + (column - longer) / pieces_.size;
    return key / row_ * pieces_.number + piece;
  }

  KeyTile operator[](int64_t tile) const {
    if (even_) return cut(tile * kTile, kTile);
    const int64_t piece = tile % pieces_.number;
    return cut(tile / pieces_.number * row_ + pieces_.begin(piece), pieces_.length(piece));
  }

 private:
  static int64_t row_of(int64_t width) { return width == 0 || width > kTile ? width : kTile / width * width; }
  KeyTile cut(int64_t key, int64_t count) const { return {key, keys_ - key < count ? keys_ - key : count}; }

  int64_t keys_, row_;
  bool even_;
  Pieces pieces_;
};

// Rows of a tensor, one a lane: those of a list, or one after the other.
struct Places {
  const int32_t* list;
  int64_t first;
  DGM_INLINE_METHOD int64_t operator[](int64_t n) const { return list ? list[n] : first + n; }
};

// The queries of a panel, in its first `count` lanes.
struct Panel {
  int64_t count = 0;
  int32_t query[kPanel];
  Places places() const { return {query, 0}; }
};

// The panels of a head's queries. With a mask over pictures a panel is two rows high and a vector wide: its queries
// then see fewer different keys than those of a longer run in one row.
class Panels {
 public:
  explicit Panels(const ForwardArgs& a) : queries_(a.queries), width_(a.mask.width) {
    patches_ = width_ > 0 && a.mask.first == 0 && queries_ % (2 * width_) == 0;
    across_ = patches_ ? ceil_divide(width_, kWidth) : 1;
  }

  int64_t number() const { return patches_ ? queries_ / (2 * width_) * across_ : ceil_divide(queries_, kPanel); }

  Panel operator[](int64_t index) const {
    Panel panel;
    if (!patches_) {
      for (int64_t i = index * kPanel; i < queries_ && panel.count < kPanel; ++i) add(i, panel);
      return panel;
    }
    const int64_t row = index / across_ * 2, left = index % across_ * kWidth;
    for (int64_t y = row; y < row + 2; ++y)
      for (int64_t x = left; x < left + kWidth && x < width_; ++x) add(y * width_ + x, panel);
    return panel;
  }

 private:
  static void add(int64_t query, Panel& panel) { panel.query[panel.count++] = static_cast<int32_t>(query); }

  int64_t queries_, width_, across_;
  bool patches_;
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
