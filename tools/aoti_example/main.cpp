// Runs a package of SparseModule.save_aoti without Python: reads one float32 input, writes the first output.
//
//   aoti_example MODEL.pt2 INPUT OUTPUT 1,3,224,224
//
// INPUT and OUTPUT hold raw float32 numbers. Built by tools/aoti_example/build.sh, or by CMake:
//
//   find_package(Torch REQUIRED)
//   add_executable(aoti_example main.cpp)
//   target_link_libraries(aoti_example ${TORCH_LIBRARIES})

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

static std::vector<int64_t> parse_shape(const std::string& text) {
    std::vector<int64_t> shape;
    std::stringstream stream(text);
    for (std::string size; std::getline(stream, size, ',');) shape.push_back(std::stoll(size));
    return shape;
}

static at::Tensor read(const std::string& path, const std::vector<int64_t>& shape) {
    at::Tensor x = at::empty(shape, at::kFloat);
    std::ifstream file(path, std::ios::binary);
    if (!file.read(static_cast<char*>(x.data_ptr()), static_cast<std::streamsize>(x.nbytes())))
        throw std::runtime_error(path + " is shorter than " + std::to_string(x.nbytes()) + " bytes");
    return x;
}

static void write(const std::string& path, const at::Tensor& tensor) {
    const at::Tensor y = tensor.contiguous();
    std::ofstream file(path, std::ios::binary);
    if (!file.write(static_cast<const char*>(y.data_ptr()), static_cast<std::streamsize>(y.nbytes())))
        throw std::runtime_error("cannot write " + path);
}

int main(int argc, char** argv) {
    if (argc != 5) {
        std::cerr << "usage: aoti_example MODEL.pt2 INPUT OUTPUT SHAPE\n";
        return 2;
    }
    try {
        c10::InferenceMode inference;
        torch::inductor::AOTIModelPackageLoader model(argv[1]);
        // The library trusts its inputs: shape, dtype and memory format must be those it was compiled for.
        std::cout << "compiled for " << model.get_metadata()["inputs"] << "\n";
        std::vector<at::Tensor> inputs{read(argv[2], parse_shape(argv[4]))};
        write(argv[3], model.run(inputs)[0]);
    } catch (const c10::Error& error) {
        std::cerr << error.what_without_backtrace() << "\n";
        return 1;
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
    return 0;
}
