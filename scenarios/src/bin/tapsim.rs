//! The testbed's program; everything is in the library.

fn main() -> std::process::ExitCode {
    scenarios::cli::main()
}
