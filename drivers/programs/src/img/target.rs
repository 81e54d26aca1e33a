//! New images, for `create` and `convert`.

use crate::size::parse_size;
use clap::Args;
use tap_host::{Errno, FileId};
use tap_images::{ImageError, ImageFormat, ImageHost, ImageSpec, qcow, raw};

/// Options of a new image.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct TargetOptions {
    /// Options of the format, as NAME=VALUE[,NAME=VALUE...]; qcow: cluster_size (512 to 64k), l2_entries (64 to 8192)
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// A new image.
pub(super) struct Target {
    /// Where, and as what; not to be probed.
    pub(super) spec: ImageSpec,
    /// A multiple of 512.
    pub(super) size_bytes: u64,
    /// Name of its backing file.
    pub(super) backing: Option<String>,
    /// Files that it is made from, and is none of.
    pub(super) apart: Vec<FileId>,
}

impl Target {
    /// Creates it, out of the file that is there if there is one.
    pub(super) async fn create<H: ImageHost>(&self, host: &H, options: &TargetOptions) -> Result<(), String> {
        match self.create_as(host, options, None).await {
            Err(Problem::Image(e)) if e.errno() == Errno::EEXIST => {
                self.create_as(host, options, Some(&self.apart)).await.map_err(Problem::text)
            }
            result => result.map_err(Problem::text),
        }
    }

    async fn create_as<H: ImageHost>(
        &self,
        host: &H,
        options: &TargetOptions,
        existing: Option<&[FileId]>,
    ) -> Result<(), Problem> {
        let path = &self.spec.path;
        let pairs = options.pairs().map_err(Problem::Text)?;
        let refused = |what: String| Problem::Text(format!("create {path}: {what}"));
        if self.spec.format == ImageFormat::Qcow {
            let mut layout = qcow::CreateOptions {
                backing: self.backing.clone(),
                existing: existing.map(<[FileId]>::to_vec),
                ..Default::default()
            };
            for (name, value) in pairs {
                let place = match name.as_str() {
                    "cluster_size" => &mut layout.cluster_bits,
                    "l2_entries" => &mut layout.l2_bits,
                    _ => return Err(refused(format!("qcow has no option '{name}'"))),
                };
                *place = Some(power_of_two(&value).map_err(&refused)?);
            }
            return qcow::create(host, path, self.size_bytes, &layout).await.map_err(Problem::Image);
        }
        if let Some((name, _)) = pairs.first() {
            return Err(refused(format!("raw has no option '{name}'")));
        }
        if self.backing.is_some() {
            return Err(refused("a raw image has no backing file; use -f qcow".to_owned()));
        }
        raw::create(host, path, self.size_bytes, existing).await.map_err(Problem::Image)
    }
}

enum Problem {
    Image(ImageError),
    Text(String),
}

impl Problem {
    fn text(self) -> String {
        match self {
            Problem::Image(error) => error.to_string(),
            Problem::Text(text) => text,
        }
    }
}

impl TargetOptions {
    fn pairs(&self) -> Result<Vec<(String, String)>, String> {
        let parts = self.options.iter().flat_map(|o| o.split(',')).filter(|p| !p.is_empty());
        parts
            .map(|part| match part.split_once('=') {
                Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
                None => Err(format!("use option '{part}': write NAME=VALUE")),
            })
            .collect()
    }
}

fn power_of_two(text: &str) -> Result<u32, String> {
    let value = parse_size(text)?;
    if value.is_power_of_two() {
        Ok(value.trailing_zeros())
    } else {
        Err(format!("{text} is no power of two"))
    }
}
