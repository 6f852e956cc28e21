//! What follows from which step of a program reads which value.

use super::program::{Kind, Program, ReaderView, Row, Value};
use crate::error::{Result, bail};
use crate::microkernels::activations::Activation;

impl Program {
    /// Checks and analyses the program that has just been read.
    pub(super) fn connect(&mut self) -> Result<()> {
        self.find_norms()?;
        self.find_differentiated();
        let met = self.find_meetings()?;
        for row in self.steps.iter().flat_map(|step| &step.source.rows) {
            if let Some((gate, _)) = row.gate {
                self.values[gate].zeroed = true;
            }
        }
        for (index, (value, met)) in self.values.iter_mut().zip(&met).enumerate() {
            value.zeroed |= index != self.output && met.contains(&false);
        }
        let mut seen: Vec<Vec<bool>> = self.values.iter().map(|v| vec![v.zeroed; v.channels]).collect();
        seen[self.output].fill(true);
        self.defer_means();
        let deferred: Vec<_> = self.values.iter().filter_map(|value| value.mean).collect();
        // The backward pass goes through the steps from the last to the first.
        for step in self.steps.iter_mut().rev().filter(|step| step.differentiate && !deferred.contains(&step.value)) {
            for row in &mut step.source.rows {
                row.first = !std::mem::replace(&mut seen[row.value][row.channel], true);
            }
        }
        self.find_views();
        self.place();
        Ok(())
    }

    /// Finds which value's channel each norm's channel normalises.
    fn find_norms(&mut self) -> Result<()> {
        let mut normed = vec![None; self.norm_channels()];
        for row in self.steps.iter().flat_map(|step| &step.source.rows) {
            let Some(norm) = row.norm else { continue };
            match normed[norm] {
                None => {
                    normed[norm] = Some((row.value, row.channel));
                    self.values[row.value].norms.push((row.channel, norm));
                    self.values[row.value].normed = true;
                }
                Some(found) if found == (row.value, row.channel) => {}
                Some(found) => bail!("channel {norm} of the norms reads {found:?} and {:?}", (row.value, row.channel)),
            }
        }
        if let Some(channel) = normed.iter().position(Option::is_none) {
            bail!("channel {channel} of the norms reads nothing");
        }
        Ok(())
    }

    /// Finds the steps whose source's gradient is wanted: that of all that depends on the input (if
    /// its gradient is wanted) or on a parameter.
    fn find_differentiated(&mut self) {
        let mut wanted = vec![self.input_grad; 1];
        for step in &mut self.steps {
            let rows = &step.source.rows;
            step.differentiate = rows.iter().any(|row| wanted[row.value] || row.norm.is_some());
            wanted.push(step.differentiate || matches!(step.kind, Kind::Conv(_)));
        }
    }

    /// Whether a step reads each channel of each value.
    ///
    /// Tasks of a step differ in channels, so no two of its channels may add to the same gradient,
    /// be it that of a gate.
    fn find_meetings(&self) -> Result<Vec<Vec<bool>>> {
        let mut met: Vec<Vec<Option<(usize, usize)>>> =
            self.values.iter().map(|value| vec![None; value.channels]).collect();
        for step in &self.steps {
            for channel in 0..step.source.channels() {
                let rows = step.source.channel(channel);
                for (value, own) in rows.iter().flat_map(|row| [Some((row.value, row.channel)), row.gate]).flatten() {
                    match met[value][own].replace((step.value, channel)) {
                        Some((step_of, other)) if step_of == step.value && other != channel => {
                            bail!("channels {other} and {channel} of a step both read channel {own} of value {value}")
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(met.into_iter().map(|met| met.iter().map(Option::is_some).collect()).collect())
    }

    /// Finds the means that leave their gradient to the step that makes what they read: it is the
    /// same for all pixels of an image but for the activation's derivative. Others must read all of
    /// that too, so that there is a gradient to add to.
    fn defer_means(&mut self) {
        // Which step reads each channel of each value first, and whether others do.
        let mut readers: Vec<Vec<(usize, bool)>> =
            self.values.iter().map(|value| vec![(0, false); value.channels]).collect();
        for step in &self.steps {
            for row in &step.source.rows {
                let (first, others) = &mut readers[row.value][row.channel];
                if *first == 0 {
                    *first = step.value;
                }
                *others |= *first != step.value;
            }
        }
        for step in self.steps.iter().filter(|step| matches!(step.kind, Kind::Mean)) {
            let rows = &step.source.rows;
            let Row { value, activation, .. } = rows[0];
            let channels = self.values[value].channels;
            let alike = |(channel, row): (usize, &Row)| {
                (row.value, row.channel, row.activation) == (value, channel, activation)
                    && row.gate.is_none()
                    && row.mask.is_none()
            };
            let whole = [rows.len(), step.source.channels()] == [channels; 2] && rows.iter().enumerate().all(alike);
            // Whether gradients are wanted does not matter: the size of what is kept must not
            // depend on it.
            let others = readers[value].iter().all(|&(first, others)| others || first != 0 && first != step.value);
            if whole && self.values[value].mean.is_none() && others {
                self.values[value].mean = Some(step.value);
                self.values[step.value].kept_rows = 3;
            }
        }
    }

    /// Finds the values that all readers read alike.
    fn find_views(&mut self) {
        // For each channel of each value what its first reader makes of it.
        type Reading = (Activation, Option<usize>);
        let mut first: Vec<Vec<Option<Reading>>> =
            self.values.iter().map(|Value { channels, .. }| vec![None; *channels]).collect();
        let mut same: Vec<bool> = (0..self.values.len()).map(|value| value != 0 && value != self.output).collect();
        for row in self.steps.iter().flat_map(|step| &step.source.rows) {
            let reading = (row.activation, row.norm);
            same[row.value] &= *first[row.value][row.channel].get_or_insert(reading) == reading;
            if let Some((gate, _)) = row.gate {
                same[gate] = false;
            }
        }
        for ((value, first), same) in self.values.iter_mut().zip(first).zip(same) {
            let Some(Some((activation, _))) = first.first().copied() else { continue };
            if same && first.iter().all(|reading| reading.is_some_and(|(other, _)| other == activation)) {
                let norms = first.iter().map(|reading| reading.and_then(|(_, norm)| norm)).collect();
                value.view = Some(ReaderView { activation, norms });
            }
        }
    }
}
