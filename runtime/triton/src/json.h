// JSON as Triton, its clients and libt5gemma write it. Numbers stay the text that they are, so that none is rounded.
#ifndef T5GEMMA_TRITON_JSON_H
#define T5GEMMA_TRITON_JSON_H

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

class Json {
public:
    enum class Kind { Null, Flag, Number, Text, List, Object };

    /// Null.
    Json() = default;
    static Json object() { return Json(Kind::Object, {}); }
    static Json list() { return Json(Kind::List, {}); }
    static Json text(std::string text) { return Json(Kind::Text, std::move(text)); }
    static Json flag(bool value) { return Json(Kind::Flag, value ? "true" : "false"); }
    /// A number in JSON's spelling.
    static Json number(std::string spelling) { return Json(Kind::Number, std::move(spelling)); }
    /// Throws std::invalid_argument, which says what was expected at which byte.
    static Json parse(std::string_view text);

    Kind kind() const { return kind_; }
    bool is_true() const { return kind_ == Kind::Flag && scalar_ == "true"; }
    /// The text, or the spelling of a number or a flag.
    const std::string &scalar() const { return scalar_; }
    const std::vector<Json> &items() const { return items_; }
    std::vector<std::pair<std::string, Json>> &members() { return members_; }
    const std::vector<std::pair<std::string, Json>> &members() const { return members_; }
    /// The member of an object; nullptr if there is none.
    const Json *find(std::string_view name) const;
    /// A member of an object and its objects, such as "parameters.model.string_value"; Null if there is none.
    const Json &at(std::string_view path) const;
    void add(Json item) { items_.push_back(std::move(item)); }
    /// Adds or replaces the member of an object.
    void set(std::string_view name, Json value);
    /// Takes the member of an object out of it.
    std::optional<Json> remove(std::string_view name);
    std::string write() const;

private:
    Json(Kind kind, std::string scalar) : kind_(kind), scalar_(std::move(scalar)) {}

    Kind kind_ = Kind::Null;
    std::string scalar_;
    std::vector<Json> items_;
    std::vector<std::pair<std::string, Json>> members_;
};

#endif
