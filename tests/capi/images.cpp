// Images through C++ and so through C: images MODEL FILE STEPS < pixels, which are width, height, then red, green and blue of each.
// The tokens of a text with the file are written to a line, then those with the pixels, then what is wrong with too few images.
#include <fstream>
#include <iostream>
#include <iterator>

#include <t5gemma.hpp>

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    const auto model = t5g::Model::open(argv[1]);
    t5g::GenerationOptions options;
    options.max_new_tokens = std::stol(argv[3]);

    std::ifstream file(argv[2], std::ios::binary);
    t5g::Image encoded, pixels;
    encoded.bytes.assign(std::istreambuf_iterator<char>(file), {});
    std::size_t height = 0;
    std::cin >> pixels.width >> height;
    for (int value; std::cin >> value;) pixels.bytes.push_back(static_cast<std::uint8_t>(value));
    if (pixels.bytes.size() != 3 * pixels.width * height) return 2;

    const auto source = [] { return t5g::Sources::texts({"<start_of_image> a"}); };
    for (const auto &image : {encoded, pixels}) {
        const auto result = model.generate(source().images({{image}}).pan_and_scan(false), options);
        for (const auto token : result.hypothesis(0, 0).tokens) std::cout << token << ' ';
        std::cout << '\n';
    }
    for (const auto &images : {std::vector<std::vector<t5g::Image>>(1), std::vector<std::vector<t5g::Image>>()}) {
        try {
            model.generate(source().images(images), options);
            return 1;
        } catch (const t5g::Error &error) {
            std::cout << error.what() << '\n';
        }
    }
}
