/* Loads the library, generates, and unloads it, again and again: reload LIBRARY MODEL. From the third time on it may take
 * no more memory to speak of. */
#define _DEFAULT_SOURCE
#include <dlfcn.h>
#include <unistd.h>

#include "check.h"

/* Resident memory in KiB. */
static long resident(void) {
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%*d %ld", &pages) == 1);
    fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

#define FIND(name)                                                                                                     \
    __typeof__(&name) own_##name;                                                                                      \
    CHECK((*(void **)(&own_##name) = dlsym(library, #name)) != NULL)

int main(int argc, char **argv) {
    CHECK(argc == 3);
    long settled = 0;
    for (int time = 0; time < 12; time++) {
        void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) fprintf(stderr, "%s\n", dlerror());
        CHECK(library != NULL);
        FIND(t5g_model_open);
        FIND(t5g_model_generate);
        FIND(t5g_result_free);
        FIND(t5g_model_free);
        FIND(t5g_live_handles);
        t5g_model *model;
        t5g_result *result;
        const char *text = "Dr. Smith paid $3.50";
        t5g_sources sources = t5g_sources_default();
        sources.rows = 1;
        sources.texts = &text;
        CHECK(own_t5g_model_open(argv[2], NULL, &model) == NULL);
        CHECK(own_t5g_model_generate(model, &sources, NULL, NULL, &result) == NULL);
        CHECK(own_t5g_result_free(result) == T5G_OK && own_t5g_model_free(model) == T5G_OK);
        CHECK(own_t5g_live_handles() == 0 && dlclose(library) == 0);
        if (time == 2) settled = resident();
    }
    long grown = resident() - settled;
    printf("well: %ld KiB more after nine further times\n", grown);
    return grown < 8192 ? 0 : 1;
}
