//! New images, for `create` and `convert`.

use clap::Args;
use tap_host::{Errno, FileId};
use tap_images::{Format, Formats, ImageHost, NewImage, SHIPPED};

/// Options of a new image.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct TargetOptions {
    #[arg(short, value_name = "OPTIONS", help = options_help())]
    options: Vec<String>,
}

fn options_help() -> String {
    let all = SHIPPED.iter().filter(|format| !format.info().options.is_empty()).map(|format| {
        let options =
            format.info().options.iter().map(|option| format!("{} ({})", option.name, option.values));
        format!("{format}: {}", options.collect::<Vec<_>>().join(", "))
    });
    let all = all.collect::<Vec<_>>().join("; ");
    format!("Options of the format, as NAME=VALUE[,NAME=VALUE...]; {all}")
}

/// A new image.
pub(super) struct Target {
    pub(super) format: Format,
    pub(super) path: String,
    /// A multiple of 512.
    pub(super) size_bytes: u64,
    /// Name of its backing file.
    pub(super) backing: Option<String>,
    /// The files that it is made from, which it must not be.
    pub(super) apart: Vec<FileId>,
}

impl Target {
    /// Creates it, and overwrites an existing file.
    pub(super) async fn create<H: ImageHost>(&self, host: &H, options: &TargetOptions) -> Result<(), String> {
        let (size_bytes, backing) = (self.size_bytes, self.backing.clone());
        let image = NewImage { size_bytes, backing, existing: None, options: options.pairs()? };
        let create = |image| Formats::shipped().create(host, self.format, &self.path, image);
        let made = match create(image.clone()).await {
            Err(e) if e.errno() == Errno::EEXIST => {
                create(NewImage { existing: Some(self.apart.clone()), ..image }).await
            }
            result => result,
        };
        made.map_err(|e| e.to_string())
    }
}

impl TargetOptions {
    fn pairs(&self) -> Result<Vec<(String, String)>, String> {
        let parts = self.options.iter().flat_map(|o| o.split(',')).filter(|p| !p.is_empty());
        parts
            .map(|part| match part.split_once('=') {
                Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
                None => Err(format!("use option '{part}': write it as NAME=VALUE")),
            })
            .collect()
    }
}
