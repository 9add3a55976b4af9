/* What the C tests share: a check that tells where it failed and ends the program. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "t5gemma.h"

#define CHECK(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* That a call succeeded. */
#define WELL(call) check_well((call), __FILE__, __LINE__)

/* That a call failed with a code, a field (NULL: none) and a part of its message. */
#define FAILS(call, code, field, part) check_fails((call), (code), (field), (part), __FILE__, __LINE__)

static inline void check_well(t5g_error *error, const char *file, int line) {
    if (error == NULL) return;
    fprintf(stderr, "%s:%d: %s\n", file, line, t5g_error_message(error));
    exit(1);
}

static inline void check_fails(t5g_error *error, t5g_code code, const char *field, const char *part, const char *file,
                               int line) {
    const char *message = error == NULL ? "no error" : t5g_error_message(error);
    const char *found = error == NULL ? NULL : t5g_error_field(error);
    int same = field == NULL ? found == NULL : found != NULL && strcmp(found, field) == 0;
    if (error == NULL || t5g_error_code(error) != code || !same || strstr(message, part) == NULL) {
        fprintf(stderr, "%s:%d: expected code %d, field %s, \"%s\"; found code %d, field %s: %s\n", file, line, code,
                field ? field : "none", part, error == NULL ? 0 : t5g_error_code(error), found ? found : "none", message);
        exit(1);
    }
    CHECK(t5g_error_free(error) == T5G_OK);
}

#endif
