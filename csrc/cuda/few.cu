// The kernels for one number of classes; built once for each LOMIX_CLASSES from 1 to kMostFew.
#include "few_launch.cuh"

namespace lomix::cuda {

template cudaError_t launch_statistics_few<LOMIX_CLASSES, false>(const Call<float>&, Memory, cudaStream_t);
template cudaError_t launch_gradients_few<LOMIX_CLASSES, false>(const Call<float>&, Memory, cudaStream_t);

}  // namespace lomix::cuda
