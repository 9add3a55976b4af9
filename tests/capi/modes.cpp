// Half of a program whose other half reports failures in another way: modes DEMO. Compiled once as it is, and once with
// T5GEMMA_EXPECTED, and linked together: each half keeps its own t5gemma.hpp.
#include <cstdio>
#include <cstdlib>

#include <t5gemma.hpp>

static void check(bool is_well, int line) {
    if (is_well) return;
    std::fprintf(stderr, "%s:%d\n", __FILE__, line);
    std::exit(1);
}

#ifdef T5GEMMA_EXPECTED

void returning(const char *demo) {
    auto none = t5g::Model::open("/no/such/model");
    check(!none && none.error().code() == T5G_ERROR_FILE, __LINE__);
    auto model = t5g::Model::open(demo);
    check(model.has_value(), __LINE__);
    auto result = model->generate(t5g::Sources::texts({"in 1990"}));
    check(result && !result->text(0)->empty() && model->tokenizer()->encode("a")->size() > 0, __LINE__);
}

#else

void returning(const char *demo);

int main(int, char **argv) {
    for (int time = 0; time < 2; time++) {
        bool is_caught = false;
        try {
            t5g::Model::open("/no/such/model");
        } catch (const t5g::Error &error) {
            is_caught = error.code() == T5G_ERROR_FILE;
        }
        check(is_caught, __LINE__);
        auto model = t5g::Model::open(argv[1]);
        auto result = model.generate(t5g::Sources::texts({"in 1990"}));
        check(!result.text(0).empty() && model.tokenizer().encode("a").size() > 0, __LINE__);
        returning(argv[1]);
    }
    std::puts("well");
}

#endif
