//! The testbed's program; the code is in the library.

fn main() -> std::process::ExitCode {
    scenarios::cli::main()
}
