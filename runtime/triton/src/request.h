// A request from Triton's call of Execute until its final response: what it brings, its responses, and the order of its end.
#ifndef T5GEMMA_TRITON_REQUEST_H
#define T5GEMMA_TRITON_REQUEST_H

#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <t5gemma.hpp>

#include "hosted.h"
#include "json.h"
#include "tensors.h"
#include "triton.h"

class Request {
public:
    /// Takes a request of Triton, which `end` or `fail` gives back.
    Request(Hosted &hosted, TRITONBACKEND_ModelInstance *instance, TRITONBACKEND_Request *request);
    Request(const Request &) = delete;
    Request &operator=(const Request &) = delete;

    Hosted &hosted() const { return hosted_; }
    /// Its inputs. Throws Failure for one that is not usable.
    std::vector<Tensor> inputs() const;
    /// Its parameters as JSON values, without those that are meant for Triton.
    Json parameters() const;
    /// Whether the client has named this output; all outputs count as none.
    bool names(const std::string &output) const { return named_.count(output) > 0; }
    /// Whether this output is to be sent: if it is named, or if none is.
    bool wants(const std::string &output) const { return named_.empty() || names(output); }
    /// Cancellation, deadline, priority and tenant; their parameters are taken out. The request must outlive the call.
    t5g::Call call(Json &parameters);

    /// The computation begins: what was before counts as waiting.
    void admitted() { admitted_ = admitted_ ? admitted_ : now(); }
    /// Sends a response that others will follow; of models with decoupled transactions only.
    void send(const std::vector<Output> &outputs) { (void)respond(outputs, 0); }
    /// Sends the final response and gives the request back to Triton; the object is gone then.
    static void end(std::unique_ptr<Request> request, const std::function<std::vector<Output>()> &outputs) noexcept;
    static void fail(std::unique_ptr<Request> request, std::exception_ptr error) noexcept;

    /// Passes a cancellation by the client on.
    void cancel_if_told();

private:
    static std::uint64_t now();
    /// False if an error was sent in their place.
    bool respond(const std::vector<Output> &outputs, std::uint32_t flags);
    void respond(std::exception_ptr error) noexcept;
    /// Tells Triton's statistics of a response of a decoupled model that was sent, whose outputs were written from `written` on
    /// (0: it has none).
    void report(std::uint64_t written, TRITONSERVER_Error *error) noexcept;
    /// Gives the request back.
    void close(bool success, std::uint64_t computed) noexcept;

    Hosted &hosted_;
    TRITONBACKEND_ModelInstance *instance_;
    TRITONBACKEND_Request *request_;
    TRITONBACKEND_ResponseFactory *factory_ = nullptr;
    std::set<std::string> named_;
    std::uint64_t admitted_ = 0;
    /// When the last response was sent.
    std::uint64_t responded_ = 0;
    t5g::Cancellation cancellation_;
    bool is_cancelled_ = false;
};

#endif
