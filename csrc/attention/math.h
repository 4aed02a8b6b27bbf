// The names that the kernels of attention use.
#pragma once

#include "common/products.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {

using namespace ::dgm::DGM_ISA_NAMESPACE;

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
