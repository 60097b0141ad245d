//! Empty on purpose, see `vendor/README.md`.
