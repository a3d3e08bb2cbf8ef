# Defines the target torch_spe_torch: headers and CPU libraries of the installed torch.
#
# torch's own TorchConfig.cmake demands a CUDA toolkit when torch was built with CUDA. This library builds without one,
# so it locates headers and libraries itself: in TORCH_SPE_TORCH_DIR (a LibTorch folder, or site-packages/torch), else
# where Python3_EXECUTABLE (or python3) finds its torch.
if(TARGET torch_spe_torch)
  return()
endif()

if(NOT TORCH_SPE_TORCH_DIR)
  if(Python3_EXECUTABLE)
    set(_torch_spe_python "${Python3_EXECUTABLE}")
  else()
    set(_torch_spe_python python3)
  endif()
  # find_spec does not import torch, which would take seconds.
  execute_process(
    COMMAND "${_torch_spe_python}" -c
            "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))"
    OUTPUT_VARIABLE _torch_spe_found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(TORCH_SPE_TORCH_DIR "${_torch_spe_found}" CACHE PATH "Folder of the torch to build against" FORCE)
endif()
find_file(_torch_spe_version_file NAMES torch/headeronly/version.h torch/csrc/api/include/torch/version.h
  PATHS "${TORCH_SPE_TORCH_DIR}/include" NO_DEFAULT_PATH NO_CACHE)
if(NOT _torch_spe_version_file)
  message(FATAL_ERROR
    "torch_spe needs PyTorch: no torch found in '${TORCH_SPE_TORCH_DIR}'. Install it (pip install torch) for the Python "
    "in use, or pass -DTORCH_SPE_TORCH_DIR=/path/to/libtorch.")
endif()

add_library(torch_spe_torch INTERFACE IMPORTED)
target_include_directories(torch_spe_torch SYSTEM INTERFACE
  "${TORCH_SPE_TORCH_DIR}/include" "${TORCH_SPE_TORCH_DIR}/include/torch/csrc/api/include")
foreach(_torch_spe_name torch torch_cpu c10)
  find_library(_torch_spe_lib ${_torch_spe_name}
    PATHS "${TORCH_SPE_TORCH_DIR}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
  target_link_libraries(torch_spe_torch INTERFACE "${_torch_spe_lib}")
  unset(_torch_spe_lib)
endforeach()
# A CUDA build of torch depends on libraries that need not be on the linker's path; the loader finds them.
target_link_options(torch_spe_torch INTERFACE "LINKER:--allow-shlib-undefined")

# Configure again after torch was upgraded in its place.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_torch_spe_version_file}")
file(READ "${_torch_spe_version_file}" _torch_spe_version_text)
string(REGEX REPLACE ".*define TORCH_VERSION[ \\\n]*\"([^\"]*)\".*" "\\1" TORCH_SPE_TORCH_VERSION
  "${_torch_spe_version_text}")
