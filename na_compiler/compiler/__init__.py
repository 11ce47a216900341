"""From a problem to a loaded library: target, spec, build, cache, bundle."""
