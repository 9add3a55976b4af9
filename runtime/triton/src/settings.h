// What the configuration of a Triton model says: the parameters of its config.pbtxt, and what is filled in where it is silent.
#ifndef T5GEMMA_TRITON_SETTINGS_H
#define T5GEMMA_TRITON_SETTINGS_H

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include <t5gemma.hpp>

#include "json.h"

/// Where a model of a repository is, and what is written about it.
struct Place {
    std::string name;
    /// The folder of its config.pbtxt.
    std::string repository;
    uint64_t version;
    Json config;
    /// The configuration of the backend, from --backend-config: parameters of all models.
    Json backend_config;
};

struct Settings {
    std::string name;
    /// The model folder.
    std::string folder;
    /// The options that belong to the opened folder and its engine, which models share, as they are written.
    std::map<std::string, std::string> shared;
    t5g::OpenOptions open;
    t5g::EngineOptions engine;
    /// The LoRA adapters to load: folders by name.
    std::map<std::string, std::string> adapters;
    /// Whether a folder that generates serves the hidden states of its encoder.
    bool is_encoder = false;
    bool warms_up = true;
    /// Generation options, for requests that do not set them.
    Json options = Json::object();
    bool is_decoupled = false;
    /// Whether the first axis of every tensor is Triton's batch axis.
    bool is_batched = false;
    /// How many outputs the configuration lists.
    std::size_t outputs = 0;

    /// Reads and checks; throws Failure.
    static Settings read(const Place &place);
    /// Reads the part of the configuration that the backend may fill in.
    void complete(const Json &config);
};

#endif
