// Reads and writes JSON: RFC 8259, up to 64 levels, without surrogates on their own.
#include "json.h"

#include <cstdio>
#include <stdexcept>

namespace {

constexpr int LEVELS = 64;

class Reader {
public:
    explicit Reader(std::string_view text) : text_(text) {}

    Json whole() {
        Json value = this->value(0);
        blank();
        if (at_ != text_.size()) fail("the end");
        return value;
    }

private:
    [[noreturn]] void fail(const std::string &expected) const {
        std::string found = at_ < text_.size() ? "'" + std::string(1, text_[at_]) + "'" : "the end";
        if (at_ < text_.size() && static_cast<unsigned char>(text_[at_]) >= 0x80) found = "another character";
        throw std::invalid_argument("expected " + expected + " at byte " + std::to_string(at_) + ", found " + found);
    }
    void blank() {
        while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string_view::npos) at_++;
    }
    bool take(char wanted) {
        if (at_ == text_.size() || text_[at_] != wanted) return false;
        at_++;
        return true;
    }
    void need(char wanted) {
        if (!take(wanted)) fail(std::string("'") + wanted + "'");
    }
    bool take(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    Json value(int level) {
        blank();
        if (level > LEVELS) fail("at most 64 levels");
        if (at_ == text_.size()) fail("a value");
        switch (text_[at_]) {
        case '{': return object(level);
        case '[': return list(level);
        case '"': return Json::text(string());
        case 't': if (take("true")) return Json::flag(true); break;
        case 'f': if (take("false")) return Json::flag(false); break;
        case 'n': if (take("null")) return Json(); break;
        default: return number();
        }
        fail("a value");
    }

    Json object(int level) {
        Json object = Json::object();
        need('{');
        blank();
        if (take('}')) return object;
        do {
            blank();
            std::string name = string();
            blank();
            need(':');
            Json member = value(level + 1);
            if (object.find(name)) throw std::invalid_argument("the name \"" + name + "\" comes twice");
            object.members().emplace_back(std::move(name), std::move(member));
            blank();
        } while (take(','));
        need('}');
        return object;
    }

    Json list(int level) {
        Json list = Json::list();
        need('[');
        blank();
        if (take(']')) return list;
        do {
            list.add(value(level + 1));
            blank();
        } while (take(','));
        need(']');
        return list;
    }

    std::size_t digits() {
        const std::size_t from = at_;
        while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') at_++;
        if (at_ == from) fail("a digit");
        return at_ - from;
    }

    Json number() {
        const std::size_t from = at_;
        const bool is_negative = take('-');
        if (!is_negative && (text_[at_] < '0' || text_[at_] > '9')) fail("a value");
        if (!take('0')) digits();
        if (take('.')) digits();
        if (take('e') || take('E')) {
            if (!take('+')) take('-');
            digits();
        }
        return Json::number(std::string(text_.substr(from, at_ - from)));
    }

    unsigned hex() {
        unsigned code = 0;
        for (int digit = 0; digit < 4; digit++, at_++) {
            const char c = at_ < text_.size() ? text_[at_] : ' ';
            if (c >= '0' && c <= '9') code = code * 16 + static_cast<unsigned>(c - '0');
            else if (c >= 'a' && c <= 'f') code = code * 16 + static_cast<unsigned>(c - 'a') + 10;
            else if (c >= 'A' && c <= 'F') code = code * 16 + static_cast<unsigned>(c - 'A') + 10;
            else fail("a hexadecimal digit");
        }
        return code;
    }

    void escaped(std::string &out) {
        if (at_ == text_.size()) fail("an escape");
        const char kind = text_[at_++];
        const std::string_view from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
        if (const std::size_t known = from.find(kind); known != std::string_view::npos) {
            out += to[known];
            return;
        }
        if (kind != 'u') {
            at_--;
            fail("an escape");
        }
        unsigned code = hex();
        if (code >= 0xd800 && code < 0xdc00 && take("\\u")) {
            const unsigned low = hex();
            if (low < 0xdc00 || low > 0xdfff) fail("the second half of a surrogate pair");
            code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        } else if (code >= 0xd800 && code < 0xe000) {
            fail("a surrogate pair");
        }
        const auto byte = [&](unsigned value) { out += static_cast<char>(value); };
        if (code < 0x80) {
            byte(code);
        } else if (code < 0x800) {
            byte(0xc0 | code >> 6);
            byte(0x80 | (code & 0x3f));
        } else if (code < 0x10000) {
            byte(0xe0 | code >> 12);
            byte(0x80 | (code >> 6 & 0x3f));
            byte(0x80 | (code & 0x3f));
        } else {
            byte(0xf0 | code >> 18);
            byte(0x80 | (code >> 12 & 0x3f));
            byte(0x80 | (code >> 6 & 0x3f));
            byte(0x80 | (code & 0x3f));
        }
    }

    std::string string() {
        std::string out;
        need('"');
        while (!take('"')) {
            if (at_ == text_.size() || static_cast<unsigned char>(text_[at_]) < 0x20) fail("the end of a text");
            if (take('\\')) escaped(out);
            else out += text_[at_++];
        }
        return out;
    }

    std::string_view text_;
    std::size_t at_ = 0;
};

void write_text(std::string &out, const std::string &text) {
    out += '"';
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char code[8];
            std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(c));
            out += code;
        } else {
            out += c;
        }
    }
    out += '"';
}

void write_value(std::string &out, const Json &value) {
    const char *between = "";
    switch (value.kind()) {
    case Json::Kind::Null: out += "null"; break;
    case Json::Kind::Flag:
    case Json::Kind::Number: out += value.scalar(); break;
    case Json::Kind::Text: write_text(out, value.scalar()); break;
    case Json::Kind::List:
        out += '[';
        for (const Json &item : value.items()) {
            out += std::exchange(between, ",");
            write_value(out, item);
        }
        out += ']';
        break;
    case Json::Kind::Object:
        out += '{';
        for (const auto &[name, member] : value.members()) {
            out += std::exchange(between, ",");
            write_text(out, name);
            out += ':';
            write_value(out, member);
        }
        out += '}';
        break;
    }
}

} // namespace

Json Json::parse(std::string_view text) { return Reader(text).whole(); }

const Json *Json::find(std::string_view name) const {
    for (const auto &[known, value] : members_)
        if (known == name) return &value;
    return nullptr;
}

const Json &Json::at(std::string_view path) const {
    static const Json none;
    const Json *value = this;
    while (value && !path.empty()) {
        const std::size_t dot = path.find('.');
        value = value->find(path.substr(0, dot));
        path = dot == std::string_view::npos ? std::string_view() : path.substr(dot + 1);
    }
    return value ? *value : none;
}

void Json::set(std::string_view name, Json value) {
    for (auto &[known, old] : members_) {
        if (known != name) continue;
        old = std::move(value);
        return;
    }
    members_.emplace_back(name, std::move(value));
}

std::optional<Json> Json::remove(std::string_view name) {
    for (auto it = members_.begin(); it != members_.end(); ++it) {
        if (it->first != name) continue;
        Json value = std::move(it->second);
        members_.erase(it);
        return value;
    }
    return std::nullopt;
}

std::string Json::write() const {
    std::string out;
    write_value(out, *this);
    return out;
}
